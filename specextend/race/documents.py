"""Documents to race on: the built-in text, or a .txt, .md or .pdf file, as a prompt of the wanted length."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from specextend.data.builtin import builtin_text
from specextend.data.encoded import ANSWER_MARKER, EncodedPrompt
from specextend.data.prompts import cut_to_fit, read_text
from specextend.engine import SpecExtend
from specextend.errors import ConfigError, InputError

SUFFIXES = (".txt", ".md", ".pdf")
MAX_BYTES = 20 * 2**20
MAX_CHARACTERS_PER_TOKEN = 16  # more than any tokenizer needs on average
BUILTIN = "Python language reference"


def read_prompt(engine: SpecExtend, path: Path | None, tokens: int) -> EncodedPrompt:
    """The document's first `tokens` tokens, all of it where it is shorter; None is the built-in text.

    A chat model's prompt keeps its last tokens too, which say that the answer begins.
    """
    if tokens < 1:
        raise ConfigError(f"the prompt's length is {tokens} tokens; it must be at least 1")
    characters = MAX_CHARACTERS_PER_TOKEN * tokens
    text = builtin_text() if path is None else read_document(path, characters)
    ids = engine.encode(text[:characters])
    kept = cut_to_fit(ids, tokens, ANSWER_MARKER if engine.models.preset.template else 0)
    return EncodedPrompt(kept, BUILTIN if path is None else path.name, len(ids))


def read_document(path: Path, characters: int) -> str:
    """Text of a file, of a PDF at least its first `characters` where it has so many."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path.name} is not one of {', '.join(SUFFIXES)}; save the document as one of them")
    if not path.is_file():
        raise InputError(f"{path.name} is not there any more; upload it again")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{path.name} has {size / 2**20:.0f} MB; at most {MAX_BYTES // 2**20} MB are read: split it")
    text = _read_pdf(path, characters) if suffix == ".pdf" else _read_plain(path)
    if not text.strip():
        raise InputError(f"{path.name} is empty; choose a document with text in it")
    return text


def _read_plain(path: Path) -> str:
    try:
        return read_text(path)
    except InputError as error:  # visitors know the file by its name, not by where the server keeps it
        raise InputError(str(error).replace(str(path), path.name)) from error


def _read_pdf(path: Path, characters: int) -> str:
    if importlib.util.find_spec("pypdf") is None:
        raise InputError("reading a PDF needs pypdf: pip install pypdf, or save the document as .txt")
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, PyPdfError

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # of a sloppy PDF it says a line per object
    pages: list[str] = []
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise InputError(f"{path.name} is protected by a password; save it without one")
        for page in reader.pages:
            pages.append(page.extract_text())
            if sum(map(len, pages)) >= characters:
                break
    except DependencyError as error:
        raise InputError(f"{path.name} is encrypted; reading it needs: pip install cryptography") from error
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        # pypdf meets a damaged file with any of these
        raise InputError(
            f"{path.name} cannot be read as a PDF; it may be damaged: save it again, or as .txt"
        ) from error
    if not "".join(pages).strip():
        raise InputError(
            f"{path.name} has {len(pages)} pages and no text: a scan is only pictures; run OCR over it, or choose "
            "another document"
        )
    return "\n\n".join(page.strip() for page in pages)
