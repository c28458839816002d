import io
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from specextend.data import cutting, prepare
from specextend.data.cutting import GAP, Cutter, Document, SameDocuments, document_in
from specextend.data.prepare import PrepareConfig, ensure_data, prepare_folder, prepare_known, prepare_prompts
from specextend.data.prompts import SUMMARY_TEMPLATE, find_buckets, read_prompts
from specextend.data.templates import encode_prompt, format_prompt
from specextend.errors import InputError, ModelError

ROOT = Path(__file__).parents[2]
SENTENCE = "the river ran past the old mill and nobody in the village knew where it ended or why it had begun"
WORDS = SENTENCE.split()
LOAD_CUTTER = cutting.load_cutter  # the real one; `tiny_tokenizer` replaces it in every test


def story(seed: int, words: int) -> str:
    """A text of `words` words that differs from any other seed's."""
    return f"Story {seed}. " + " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(words))


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts <s> before a text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([story(seed, 100) for seed in range(4)] + [SUMMARY_TEMPLATE], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ bos_token }}[USER] {{ messages[0].content }} [ASSISTANT]",
    )


TOKENIZER = bpe_tokenizer()


@pytest.fixture(autouse=True)
def tiny_tokenizer(monkeypatch):
    """No model is needed to count tokens here."""
    monkeypatch.setattr(prepare, "load_cutter", lambda name: Cutter(TOKENIZER, None))
    monkeypatch.setattr(prepare, "load_limit", lambda name, room: 1280 - room)


@pytest.fixture
def short_topics(monkeypatch):
    """The language reference's topics, each cut short: the tiny vocabulary makes the whole a quarter million tokens."""
    topics = [(name, text[:100]) for name, text in prepare.builtin_topics()]
    monkeypatch.setattr(prepare, "builtin_topics", lambda: topics)


def config(root: Path, lengths=(128, 256), samples=3, **more) -> PrepareConfig:
    return PrepareConfig(root, lengths=lengths, samples=samples, **more)


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# Cutting


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
    st.integers(1, 40),
    st.sampled_from([None, "chat", "vicuna_v1.1"]),
)
@settings(max_examples=60, deadline=None)
def test_a_cut_prompt_fills_its_length_with_templates_counted(piece, repeat, template):
    text = f"{piece} river " * repeat * 8
    whole = len(TOKENIZER(text, add_special_tokens=False).input_ids)
    records = Cutter(TOKENIZER, template).records(Document(text, "here"), [512, 1024])
    assert list(records) == [length for length in (512, 1024) if length <= whole]
    for length, record in records.items():
        tokens = len(encode_prompt(record["text"], template, TOKENIZER))
        assert length - 8 <= tokens == record["trunc_length"] <= length  # a cut inside a merge may cost a few tokens
        assert record["original_length"] == whole and record["source"] == "here"
        head, tail = SUMMARY_TEMPLATE.split("{text}")
        assert record["text"].startswith(head) and record["text"].endswith(tail)
        assert text.startswith(record["text"][len(head) : -len(tail)])
        assert format_prompt(record["text"], template, TOKENIZER).count("### Summary:") == 1


def test_a_length_that_the_template_fills_is_an_input_error():
    with pytest.raises(InputError, match="64 tokens is filled by the prompt's template"):
        Cutter(TOKENIZER, "vicuna_v1.1").records(Document(story(1, 500), "here"), [64])


@pytest.mark.parametrize("template", [TOKENIZER.chat_template, None])
def test_a_models_tokenizer_and_template_are_loaded_without_its_weights(tmp_path, template):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    cutter = LOAD_CUTTER(str(tmp_path))
    assert cutter.template == ("chat" if template else None)
    assert cutter.tokenizer("the river").input_ids == tokenizer("the river").input_ids


def test_a_presets_template_counts_and_slow_tokenizers_are_refused(monkeypatch):
    monkeypatch.setattr("specextend.models.loading.load_tokenizer", lambda name: TOKENIZER)
    assert LOAD_CUTTER("vicuna_7b").template == "vicuna_v1.1"
    monkeypatch.setattr("specextend.models.loading.load_tokenizer", lambda name: SimpleNamespace(is_fast=False))
    with pytest.raises(ModelError, match="vicuna_7b has no fast tokenizer"):
        LOAD_CUTTER("vicuna_7b")


# The same documents at every length


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
    st.integers(20, 40),
    st.sampled_from([None, "chat", "vicuna_v1.1"]),
)
@settings(max_examples=40, deadline=None)
def test_a_document_without_its_middle_fills_every_length_and_keeps_beginning_end_and_instruction(
    piece, repeat, template
):
    text = "The beginning. " + f"{piece} river " * repeat * 8 + " The end."
    whole = len(TOKENIZER(text, add_special_tokens=False).input_ids)
    cutter = SameDocuments(TOKENIZER, template, 700)
    records = cutter.records(Document(text, "here"), [512, 1024])
    assert list(records) == ([512, 1024] if whole >= 700 else [])
    for length, record in records.items():
        most = min(length, 700)
        tokens = len(encode_prompt(record["text"], template, TOKENIZER))
        assert most - 8 <= tokens == record["trunc_length"] <= most
        assert record["document"] == record["source"] == "here" and record["original_length"] == whole
        head, tail = SUMMARY_TEMPLATE.split("{text}")
        assert record["text"].startswith(head) and record["text"].endswith(tail)
        beginning, _, end = record["text"][len(head) : -len(tail)].partition(GAP)
        assert text.startswith(beginning) and text.endswith(end) and len(beginning) + len(end) < len(text)
        assert beginning.startswith("The beginning.") and end.endswith("The end.")


def test_the_same_documents_serve_every_length_or_none(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for seed, words in enumerate((600, 90, 600, 600, 600)):
        (texts / f"{seed}.txt").write_text(story(seed, words))
    same = config(tmp_path / "data", lengths=(128, 512), samples=2, same_documents=True, skip=1)
    prepare_folder(texts, "mine", same)
    for length, most in (("128", 128), ("512", 512)):
        records = records_of(tmp_path / "data" / "mine" / f"mine_{length}.jsonl")
        assert [record["document"] for record in records] == ["2.txt", "3.txt"]  # 0 is skipped, 1 is too short
        assert all(record["trunc_length"] <= most for record in records)
    (tmp_path / "data" / "mine" / "mine_512.jsonl").unlink()
    (tmp_path / "data" / "mine" / "mine_128.jsonl").write_text("of other documents")
    prepare_folder(texts, "mine", same)
    assert len(records_of(tmp_path / "data" / "mine" / "mine_128.jsonl")) == 2
    with pytest.raises(InputError, match="none of 5 texts has 1280 tokens"):
        prepare_folder(texts, "long", config(tmp_path / "data", lengths=(16384,), same_documents=True, room=0, skip=9))


def test_documents_are_taken_out_of_prompts_the_longest_first_and_once(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for seed, words in enumerate((600, 300, 600)):
        (texts / f"{seed}.txt").write_text(story(seed, words))
    prepare_folder(texts, "mine", config(tmp_path, lengths=(256, 512)))
    records = list(prepare.prompt_documents(tmp_path / "mine"))
    assert [record.source for record in records] == ["mine_512.jsonl:1", "mine_512.jsonl:2", "mine_256.jsonl:2"]
    assert all(story(seed, 600).startswith(record.text[:900]) for seed, record in zip((0, 2, 1), records, strict=True))
    prepare_prompts(tmp_path / "mine", None, config(tmp_path / "cut", lengths=(128, 192), same_documents=True))
    assert [len(records_of(path)) for path in find_buckets(tmp_path / "cut" / "mine").values()] == [3, 3]
    with pytest.raises(InputError, match="mine would be read and written"):
        prepare_prompts(tmp_path / "mine", None, config(tmp_path))


def test_text_that_is_no_summarization_prompt_is_a_document_itself():
    assert document_in("\n\n" + SUMMARY_TEMPLATE.format(text="<s> A\n\nB.") + "\n\n") == "<s> A\n\nB."
    assert document_in("What is ### Text:?") == "What is ### Text:?"


def test_how_long_a_prompt_may_be_is_the_models_positions_less_the_room(tmp_path):
    assert cutting.load_limit("bundled", 384) == 16000
    with pytest.raises(InputError, match="room is 16384 tokens; bundled holds 16384"):
        cutting.load_limit("bundled", 16384)


# From a folder, from the language reference


def test_a_folder_becomes_one_file_per_length_that_read_prompts_reads(tmp_path):
    texts = tmp_path / "my_texts"
    (texts / "deep").mkdir(parents=True)
    for seed in range(3):
        (texts / f"{seed}.txt").write_text(f"<s> {story(seed, 600)}")
    (texts / "deep" / "short.md").write_bytes(b"\xef\xbb\xbf" + story(9, 50).encode().replace(b" ", b"\r\n"))
    (texts / "copy.rst").write_text(story(1, 600))
    (texts / "ignored.pdf").write_bytes(b"\xff\xfe")
    prepare_folder(texts, None, config(tmp_path / "data", samples=5))

    buckets = find_buckets(tmp_path / "data" / "my_texts")
    assert {label: path.name for label, path in buckets.items()} == {
        "128": "my_texts_128.jsonl",
        "256": "my_texts_256.jsonl",
    }
    prompts = read_prompts(buckets["128"])
    assert [prompt.extra["source"] for prompt in prompts] == ["0.txt", "1.txt", "2.txt", "deep/short.md"]
    assert all(set(prompt.extra) == {"original_length", "trunc_length", "source"} for prompt in prompts)
    assert [prompt.extra["source"] for prompt in read_prompts(buckets["256"])] == ["0.txt", "1.txt", "2.txt"]
    assert not any("<s>" in prompt.text or "\r" in prompt.text for prompt in prompts)


def test_fewer_samples_than_asked_for_are_announced(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(story(1, 150))
    prepare_folder(texts, "mine", config(tmp_path / "data", lengths=(128, 1024), samples=4))
    said = capsys.readouterr().err
    assert "mine: 1 of 4 prompts of 128" in said and "mine: 0 of 4 prompts of 1K" in said
    assert tree(tmp_path / "data") == ["mine/mine_128.jsonl"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ({}, None, "holds no text file; read are .txt"),
        ({"a.pdf": b"x"}, None, "holds no text file"),
        ({"a.txt": b"too short"}, None, "none of 1 texts has 128 tokens; give longer texts or shorter lengths"),
        ({"a.txt": b""}, None, "none of 0 texts"),
        ({"a.txt": b"caf\xe9"}, None, r"a.txt: not UTF-8 text \(byte 3\)"),
        ({"a.txt": b"x"}, "up/and/away", "'up/and/away' cannot name a folder"),
        ({"a.txt": b"x"}, "..", "'..' cannot name a folder"),
    ],
)
def test_an_unusable_folder_is_an_input_error_and_leaves_nothing(tmp_path, content, name, message):
    texts = tmp_path / "texts"
    texts.mkdir()
    for file, raw in content.items():
        (texts / file).write_bytes(raw)
    with pytest.raises(InputError, match=message):
        prepare_folder(texts, name, config(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_missing_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder; give one of"):
        prepare_folder(tmp_path / "nowhere", None, config(tmp_path))


def test_builtin_prompts_start_at_different_topics(tmp_path, short_topics):
    prepare_known("builtin", config(tmp_path, samples=20))
    records = records_of(tmp_path / "builtin" / "builtin_256.jsonl")
    assert len(records) == len({record["text"] for record in records}) == 20
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    assert all(record["source"].startswith(f"{version} pydoc_data.topics:") for record in records)
    assert all("### Text:\n\n# " in record["text"] for record in records)


def test_builtin_documents_visit_every_topic_and_hold_the_whole_text():
    documents = list(prepare.builtin_documents())
    topics = [name for name, _ in prepare.builtin_topics()]
    assert sorted(document.source.rpartition(":")[2] for document in documents) == topics
    assert len({len(document.text) for document in documents}) == 1


# Files


def test_existing_files_stay_unless_forced(tmp_path, capsys, short_topics):
    prepare_known("builtin", config(tmp_path, lengths=(128,)))
    path = tmp_path / "builtin" / "builtin_128.jsonl"
    path.write_text("mine")
    prepare_known("builtin", config(tmp_path))
    assert path.read_text() == "mine" and (tmp_path / "builtin" / "builtin_256.jsonl").exists()
    assert f"keeping {path} (--force" in capsys.readouterr().err
    prepare_known("builtin", config(tmp_path, force=True))
    assert len(records_of(path)) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_build_that_fails_leaves_no_file(tmp_path, error):
    def documents():
        yield Document(story(1, 600), "1")
        yield Document(story(2, 600), "2")
        raise error

    with pytest.raises(error):
        prepare.prepare_documents("set", documents(), config(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_a_write_that_fails_half_way_keeps_the_old_file_and_no_temporary_one(tmp_path):
    def records():
        yield {"text": "new"}
        raise KeyboardInterrupt

    path = tmp_path / "set" / "set_1K.jsonl"
    with pytest.raises(KeyboardInterrupt):
        prepare.write_records(path, records())
    assert tree(tmp_path) == []
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        prepare.write_records(path, records())
    assert tree(tmp_path) == ["set/set_1K.jsonl"] and path.read_text() == "old"


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path, short_topics):
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="data/builtin cannot be written .*choose another folder"):
        prepare_known("builtin", config(tmp_path / "data", lengths=(128,)))


def test_a_root_that_cannot_be_written_is_found_before_any_text_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").write_text("a file where the folder should be")
    monkeypatch.setattr(prepare, "hub_rows", lambda name: pytest.fail("read"))
    monkeypatch.setattr(prepare, "load_cutter", lambda name: pytest.fail("loaded"))
    with pytest.raises(InputError, match="cannot be written") as raised:
        prepare_known("pg19", config(tmp_path / "data"))
    assert raised.value.setting == "root" and capsys.readouterr().err == ""
    prepare.check_writable(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_piped_run_has_no_progress_bar_and_one_line_per_error(tmp_path, capsys):
    with pytest.raises(InputError, match="none of 1 texts"):
        prepare.collect("set", iter([Document("a b", "s")]), Cutter(TOKENIZER, None), [128], 1)
    assert capsys.readouterr().err == ""


def test_a_progress_bar_is_gone_before_the_error(monkeypatch):
    def documents():
        yield Document("a b", "s")
        time.sleep(0.15)  # long enough for the bar to be shown
        yield Document("c d", "s")

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(InputError):
        prepare.collect("set", documents(), Cutter(TOKENIZER, None), [128], 1)
    assert terminal.getvalue() == "" or terminal.getvalue().endswith("\r")


def test_flag_mistakes_are_one_line_and_status_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(monkeypatch, "--samples", "many")
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "invalid int value: 'many'" in err


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"samples": 0}, "samples is 0"), ({"lengths": ()}, "no length"), ({"skip": -1}, "skip is -1")],
)
def test_settings_out_of_range_are_input_errors(settings, message):
    with pytest.raises(InputError, match=message):
        PrepareConfig(**settings)


# From the hub


def rows_of(path: str, split: str) -> list[dict]:
    """Rows with the fields of the real sets."""
    texts = [story(seed, 600) for seed in range(6)]
    if path in ("ccdv/govreport-summarization", "launch/gov_report"):
        field = "report" if path.startswith("ccdv") else "document"
        return [{field: text, "summary": "short"} for text in texts]
    if path.startswith("emozilla/pg19"):
        header = "\n\n\n\nProduced by Somebody\n\n\n\n"
        return [
            {"short_book_title": "T", "publication_date": 1900, "url": "u", "text": header + text} for text in texts
        ]
    if path == "kmfoda/booksum":
        texts = [None, *texts[:2], *texts[:2]] if split == "test" else texts[2:]
        return [{"bid": 1, "is_aggregate": False, "chapter": text, "summary_text": "s"} for text in texts]
    if path == "HuggingFaceH4/aime_2024":
        rows = range(60, 90)
        return [
            {"id": n, "problem": f"P{n} é", "solution": "s", "answer": "204", "url": "u", "year": 2024} for n in rows
        ]
    raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")


class FakeHub:
    """Stands for `datasets.load_dataset`; `refuse` maps ids to the errors they raise."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.refuse: dict[str, Exception] = {}

    def load_dataset(self, path, *, split, streaming, revision=None, data_files=None):
        assert streaming
        self.calls.append((path, split, revision))
        if path in self.refuse and revision is None:
            raise self.refuse[path]
        return iter(rows_of(path, split))


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    monkeypatch.setattr(prepare, "probe_hub", lambda: None)
    return fake


@pytest.mark.parametrize(
    ("name", "first_source", "samples"),
    [
        ("govreport", "ccdv/govreport-summarization/test:0", 3),
        ("pg19", "emozilla/pg19-test/test:0", 3),
        ("booksum", "kmfoda/booksum/test:1", 5),
    ],
)
def test_a_known_folder_is_built_from_the_hub(tmp_path, hub, name, first_source, samples):
    data_dir = tmp_path / "data" / name
    assert ensure_data(data_dir, "bundled", lengths=(128, 256), samples=samples) == data_dir
    buckets = find_buckets(data_dir)
    assert list(buckets) == ["128", "256"]
    for path in buckets.values():
        prompts = read_prompts(path)
        assert prompts[0].extra["source"] == first_source
        assert len({prompt.text for prompt in prompts}) == len(prompts) == samples
        assert all("### Text:\n\nStory" in prompt.text for prompt in prompts)


def test_booksum_reads_its_train_split_when_test_runs_out(tmp_path, hub):
    prepare_known("booksum", config(tmp_path, lengths=(128,), samples=3))
    sources = [record["source"] for record in records_of(tmp_path / "booksum" / "booksum_128.jsonl")]
    assert sources == ["kmfoda/booksum/test:1", "kmfoda/booksum/test:2", "kmfoda/booksum/train:0"]


def test_aime_keeps_its_problems_as_they_are(tmp_path, hub):
    buckets = find_buckets(ensure_data(tmp_path / "aime24"))
    prompts = read_prompts(buckets["all"])
    assert len(prompts) == 30 and prompts[0].text == "P60 é" and prompts[0].extra == {"id": 60, "answer": "204"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Dataset scripts are no longer supported, but found govreport-summarization.py"),
        ValueError("BuilderConfig 'default' not found"),
        datasets.exceptions.DatasetNotFoundError("gone"),
    ],
)
def test_a_source_that_moved_is_replaced_by_the_next(tmp_path, hub, error):
    hub.refuse = {"ccdv/govreport-summarization": error}
    prepare_known("govreport", config(tmp_path))
    assert hub.calls[1] == ("ccdv/govreport-summarization", "test", "refs/convert/parquet")
    assert len(records_of(tmp_path / "govreport" / "govreport_256.jsonl")) == 3


def test_a_source_with_other_fields_is_replaced_by_the_next(tmp_path, hub, monkeypatch):
    rows = {"emozilla/pg19-test": [{"book": "x"}], "emozilla/pg19": [], "deepmind/pg19": [{"text": story(1, 600)}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **_: iter(rows[path]))
    prepare_known("pg19", config(tmp_path, samples=1))
    assert records_of(tmp_path / "pg19" / "pg19_128.jsonl")[0]["source"] == "deepmind/pg19/test:0"
    rows["deepmind/pg19"] = []
    with pytest.raises(InputError, match="no field 'text'; emozilla/pg19: ValueError: no rows; deepmind"):
        prepare_known("pg19", config(tmp_path / "other"))


def assert_names_both_ways_out(error: InputError, name: str) -> None:
    if name == "aime24":  # problems, of which no text can be made
        assert 'write problems as aime24/aime24.jsonl, a line each: {"problem"' in str(error)
        return
    assert f"`python scripts/prepare_data.py --from_dir FOLDER --name {name}`" in str(error)
    assert "`python scripts/prepare_data.py --builtin`" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", ["govreport", "pg19", "booksum", "aime24"])
@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach 'x' on the Hub\nlong story"), httpx.ConnectTimeout("timed out")]
)
def test_an_unreachable_hub_is_asked_once_and_both_ways_out_are_named(tmp_path, hub, name, error):
    hub.refuse = {sources[0].path: error for sources in prepare.HUB_SOURCES.values()}
    with pytest.raises(InputError, match=f"{name} cannot be fetched") as caught:
        ensure_data(tmp_path / "data" / name)
    assert_names_both_ways_out(caught.value, name)
    assert len(hub.calls) == 1 and not (tmp_path / "data").exists()


def test_the_probe_fails_before_datasets_starts_to_retry(tmp_path, hub, monkeypatch):
    def refuse():
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(prepare, "probe_hub", refuse)
    with pytest.raises(InputError, match="Name or service not known") as caught:
        ensure_data(tmp_path / "pg19")
    assert_names_both_ways_out(caught.value, "pg19")
    assert hub.calls == []


def test_a_connection_lost_on_the_way_leaves_nothing(tmp_path, hub, monkeypatch):
    def broken_stream(*_args, **_kwargs):
        yield {"text": story(1, 600)}
        raise httpx.ReadTimeout("timed out")

    monkeypatch.setattr(datasets, "load_dataset", broken_stream)
    with pytest.raises(InputError, match="pg19 cannot be fetched .*ReadTimeout") as caught:
        ensure_data(tmp_path / "data" / "pg19", lengths=(128,), samples=2)
    assert_names_both_ways_out(caught.value, "pg19")
    assert not (tmp_path / "data").exists()


def test_ensure_data_touches_neither_unknown_nor_filled_folders(tmp_path, hub):
    assert ensure_data(tmp_path / "mine") == tmp_path / "mine"
    filled = tmp_path / "govreport"
    filled.mkdir()
    (filled / "govreport_1K.jsonl").write_text('{"text": "x"}')
    ensure_data(filled)
    assert hub.calls == [] and tree(tmp_path) == ["govreport/govreport_1K.jsonl"]


def test_ensure_data_builds_the_builtin_set_without_a_hub(tmp_path, hub, short_topics):
    ensure_data(tmp_path / "builtin", lengths=(128,), samples=2)
    assert hub.calls == [] and tree(tmp_path) == ["builtin/builtin_128.jsonl"]


def test_an_unknown_set_lists_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="unknown data set 'gov'; known are govreport, pg19, booksum, aime24, builtin"):
        prepare_known("gov", config(tmp_path))


# The script


def run_script(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
    runpy.run_path(str(ROOT / "scripts" / "prepare_data.py"))["main"]()


def test_the_script_builds_from_a_folder_and_from_the_language_reference(tmp_path, monkeypatch, short_topics):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(story(1, 600))
    common = ["--root", str(tmp_path / "data"), "--lengths", "128", "256", "--samples", "1"]
    run_script(monkeypatch, "--from_dir", str(tmp_path / "texts"), "--name", "pg19", *common)
    run_script(monkeypatch, "--builtin", *common)
    assert tree(tmp_path / "data") == [
        f"{name}/{name}_{length}.jsonl" for name in ("builtin", "pg19") for length in (128, 256)
    ]


def test_the_script_builds_all_sets_of_the_hub_or_those_named(tmp_path, monkeypatch, hub):
    common = ["--root", str(tmp_path), "--lengths", "128", "-n", "1"]
    run_script(monkeypatch, "aime24", "pg19", *common)
    assert tree(tmp_path) == ["aime24/aime24.jsonl", "pg19/pg19_128.jsonl"]
    run_script(monkeypatch, *common)
    assert tree(tmp_path)[1:] == ["booksum/booksum_128.jsonl", "govreport/govreport_128.jsonl", "pg19/pg19_128.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--builtin", "--lengths", "1500"], "'1500' is not a length"),
        (["--builtin", "--samples", "0"], "samples is 0"),
        (["--builtin", "--name", "x"], "--name names what --from_dir or --from_prompts builds"),
        (["pg19", "--builtin"], "pg19 come from the hub"),
        (["gov"], "unknown data set 'gov'"),
    ],
)
def test_the_script_refuses_contradictions(tmp_path, monkeypatch, arguments, message):
    with pytest.raises(InputError, match=message):
        run_script(monkeypatch, *arguments, "--root", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_the_script_ends_with_one_line_and_status_2_in_offline_mode(tmp_path):
    began = time.monotonic()
    arguments = ["aime24", "--root", str(tmp_path / "data")]
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "write problems as aime24/aime24.jsonl" in result.stderr
    assert time.monotonic() - began < 30 and not (tmp_path / "data").exists()
