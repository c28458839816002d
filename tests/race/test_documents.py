"""Documents to race on: what is read of each kind of file, and the line that says why one cannot be used."""

from __future__ import annotations

import pytest
import torch

from specextend.data.builtin import builtin_text
from specextend.errors import ConfigError, InputError
from specextend.race import documents
from specextend.race.documents import read_document, read_prompt

pypdf = pytest.importorskip("pypdf")


def pdf_of(*texts: str) -> bytes:
    """A PDF with a page per text, in Helvetica."""
    pages = range(4, 4 + 2 * len(texts), 2)
    objects = {
        1: b"<</Type/Catalog/Pages 2 0 R>>",
        2: f"<</Type/Pages/Count {len(texts)}/Kids[{' '.join(f'{page} 0 R' for page in pages)}]>>".encode(),
        3: b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    }
    for page, text in zip(pages, texts, strict=True):
        content = f"BT /F 12 Tf 72 720 Td ({text}) Tj ET".encode()
        objects[page] = (
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents {page + 1} 0 R/Resources<</Font<</F 3 0 R>>>>>>"
        ).encode()
        objects[page + 1] = b"<</Length %d>>stream\n%s\nendstream" % (len(content), content)
    file, places = b"%PDF-1.4\n", []
    for number, body in objects.items():
        places.append(len(file))
        file += b"%d 0 obj%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    return file + b"xref\n0 %d\n0000000000 65535 f \n%strailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1, table, len(objects) + 1, len(file),
    )  # fmt: skip


def test_message_names_the_document_and_not_its_place_on_the_server(tmp_path):
    path = tmp_path / "notes.txt"
    for make in (lambda: path.write_bytes(b"caf\xe9"), path.unlink):
        make()
        with pytest.raises(InputError, match="notes.txt") as refused:
            read_document(path, 100)
        assert str(tmp_path) not in str(refused.value) and "notes.txt" in str(refused.value)


@pytest.mark.parametrize("name", ["text.txt", "text.md", "TEXT.TXT"])
def test_text_is_read_as_it_is(name, tmp_path):
    (tmp_path / name).write_bytes("\ufeff# Titel\r\n\r\nGröße </script> 漢字".encode())
    assert read_document(tmp_path / name, 100) == "# Titel\n\nGröße </script> 漢字"


def test_pdf_is_read_page_by_page_as_far_as_needed(tmp_path):
    path = tmp_path / "paper.pdf"
    path.write_bytes(pdf_of("First page.", "Second page.", "Third page."))
    assert read_document(path, 10**6) == "First page.\n\nSecond page.\n\nThird page."
    assert read_document(path, 15) == "First page.\n\nSecond page."


def encrypted(password: str):
    def write(path) -> None:
        writer = pypdf.PdfWriter()
        writer.add_blank_page(100, 100)
        writer.encrypt(password, algorithm="RC4-128")
        writer.write(path)

    return write


def scanned(path) -> None:
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(path)


BAD = {
    "scan.pdf": (scanned, "1 pages and no text"),
    "locked.pdf": (encrypted("secret"), "password"),
    "broken.pdf": (lambda path: path.write_bytes(b"%PDF-1.4\nnothing"), "damaged"),
    "cut.pdf": (lambda path: path.write_bytes(pdf_of("Text")[:300]), "damaged"),
    "hollow.pdf": (lambda path: path.write_bytes(b""), "damaged"),
    "empty.txt": (lambda path: path.write_bytes(b" \n"), "empty"),
    "binary.txt": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "UTF-8"),
    "page.docx": (lambda path: path.write_bytes(b"x"), ".txt, .md, .pdf"),
}


@pytest.mark.parametrize("name", BAD)
def test_document_that_cannot_be_used_says_why_in_a_line(name, tmp_path):
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(InputError, match=message) as found:
        read_document(tmp_path / name, 1000)
    assert name in str(found.value) and "\n" not in str(found.value)


def test_document_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_BYTES", 2**20)
    (tmp_path / "large.txt").write_text("x" * (2**20 + 1))
    with pytest.raises(InputError, match="at most 1 MB"):
        read_document(tmp_path / "large.txt", 10)


def test_prompt_is_the_documents_beginning(bundled_engine, tmp_path):
    whole = bundled_engine.encode(builtin_text()[:8000])
    prompt = read_prompt(bundled_engine, None, 64)
    assert torch.equal(prompt.ids, whole[:64]) and prompt.original_tokens > 64
    path = tmp_path / "short.txt"
    path.write_text("The council met on the first day of May.")
    prompt = read_prompt(bundled_engine, path, 64)
    assert torch.equal(prompt.ids, bundled_engine.encode(path.read_text()))
    assert (prompt.source, prompt.original_tokens) == ("short.txt", len(prompt.ids))


def test_length_must_be_positive(bundled_engine):
    with pytest.raises(ConfigError, match="length is 0"):
        read_prompt(bundled_engine, None, 0)
