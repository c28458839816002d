"""Prompts that refer back (scripts.analysis.passages, quotations) and the tables of what was accepted there."""

from __future__ import annotations

import hashlib
import json
import re
import sys

import pytest

from scripts.analysis import quotations
from scripts.analysis.passages import DEPTHS, LONGEST, OPENING, REST, SHORTEST, TASKS, make_records
from scripts.analysis.quotations import Forced, measure, settings, share
from scripts.report.quotations import FORCED, FREE, cache_of, frame_of_journals, frame_of_scores, tables
from specextend.cli import flags
from specextend.config import SamplingConfig
from specextend.data.builtin import builtin_text
from specextend.data.cutting import Document, SameDocuments, load_cutter
from specextend.data.prepare import write_records
from specextend.data.prompts import Prompt, read_prompts
from specextend.errors import InputError
from specextend.evaluation.plan import read_buckets
from tests.made_records import record, write_journal

pytestmark = pytest.mark.xdist_group("quotations")  # the documents are cut once
LENGTHS = (1024, 2048)
LIMIT = 1900


def text_of(index: int) -> str:
    """A stretch of the language reference, with words instead of its signs and a number in each sentence."""
    words = re.findall(r"[a-z]{3,}", builtin_text()[index * 60_000 :][:90_000])
    sentences = [" ".join(words[start : start + 14]) for start in range(0, len(words), 14)]
    lines = [f"{one.capitalize()}." for one in sentences]
    return "\n\n".join(" ".join(lines[start : start + 7]) for start in range(0, len(lines), 7))


@pytest.fixture(scope="module")
def cutter() -> SameDocuments:
    plain = load_cutter("bundled")
    return SameDocuments(plain.tokenizer, plain.template, LIMIT)


@pytest.fixture(scope="module")
def made(cutter) -> dict[int, list[dict]]:
    sets = [[Document(text_of(index), f"{name}:{index}") for index in range(2)] for name in ("a", "b", "c")]
    return make_records(sets, cutter, LENGTHS, 30)


def body_of(one: dict) -> str:
    return one["text"].partition("### Text:\n\n")[2].rpartition("\n\n### Task:\n")[0]


def test_prompts_are_balanced_and_ask_the_same_at_every_length(made):
    short, long = made.values()
    assert len(short) == len(long) == 30
    cases = [(one["task"], one["depth"]) for one in short]
    assert {case: cases.count(case) for case in cases} == {(task, depth): 2 for task in TASKS for depth in DEPTHS}
    for one, other in zip(short, long, strict=True):
        assert [one[name] for name in ("task", "depth", "document", "answer")] == [
            other[name] for name in ("task", "depth", "document", "answer")
        ]
        assert one["text"].rpartition("### Task:")[2] == other["text"].rpartition("### Task:")[2]


def test_a_prompt_fills_its_length_and_never_exceeds_it(made, cutter):
    for length, records in made.items():
        for one in records:
            most = min(length, LIMIT)
            assert most - 8 <= cutter.tokens_of(one["text"]) == one["trunc_length"] <= most


def test_a_passage_stands_once_in_its_document_and_at_its_depth(made, cutter):
    whole = {f"{name}:{index}": text_of(index) for name in "abc" for index in range(2)}
    for length, records in made.items():
        for one in records:
            body, answer = body_of(one), one["answer"]
            if one["task"] == "needle":
                values = [line.partition(". ")[2] for line in answer.splitlines()]
                assert len(values) == 4
                at = min(position for value in values if (position := body.find(value.split()[-1])) >= 0)
            else:
                tokens = len(cutter.tokenizer(answer, add_special_tokens=False).input_ids)
                assert (SHORTEST - 2 if one["task"] == "quote" else REST - 2) <= tokens <= LONGEST
                assert whole[one["document"]].count(answer) == body.count(answer) == 1
                at = body.index(answer)
                if one["task"] == "quote":
                    opening = " ".join(answer.split()[:OPENING])
                    assert f'"{opening}"' in one["text"] and " ".join(body.split()).count(opening) == 1
                else:
                    given = one["text"].rpartition(':\n"')[2]
                    assert " ".join(body[:at].split()).endswith(given) and given.count(".") == 2
                    at -= len(given)
            assert at / len(body) == pytest.approx(one["depth"], abs=0.08 if length == 1024 else 0.05)


def test_documents_without_a_passage_are_passed_over_or_an_input_error(cutter):
    good, table = Document(text_of(0), "good"), Document("| 1 | 2 | 3 |\n" * 3000, "table")
    assert {one["document"] for one in make_records([[table, good]], cutter, LENGTHS, 4)[1024]} == {"good"}
    with pytest.raises(InputError, match="no document has 1900 tokens and a passage of 80 to 200 tokens at depth 0.1"):
        make_records([[table, Document("Short.", "short")]], cutter, LENGTHS, 1)


def test_prompts_are_made_by_one_command_that_evaluations_read(tmp_path, monkeypatch, capsys):
    texts = tmp_path / "mine"
    texts.mkdir()
    write_records(texts / "mine_4K.jsonl", ({"text": text_of(index)} for index in range(2)))
    arguments = ["make", "--data_dir", str(texts), "--lengths", "1K", "2K", "-n", "3", "--skip", "1"]
    monkeypatch.setattr(sys, "argv", ["quotations", *arguments, "--out", str(tmp_path / "quotations")])
    quotations.main()
    assert json.loads(capsys.readouterr().out)["prompts"] == {"1K": 3, "2K": 3}
    buckets = read_buckets(tmp_path / "quotations", 20)
    assert list(buckets) == ["1K", "2K"]
    assert {prompt.extra["document"] for prompt in buckets["1K"]} == {"mine/mine_4K.jsonl:2"}
    assert [prompt.extra["task"] for prompt in buckets["2K"]] == ["quote", "continue", "needle"]


def test_prompts_of_another_kind_are_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "x_1K.jsonl").write_text('{"text": "Summarize this."}\n')
    for arguments, message in (
        (["score", "--data_dir", str(tmp_path)], "x_1K.jsonl:1 has no task, depth, answer; make prompts with `make`"),
        (["make", "--data_dir", str(tmp_path), "--skip", "-1"], "skip is -1"),
        (["table", str(tmp_path / "none.json")], "none.json is no file of `quotations score`"),
        (["table", str(tmp_path / "x_1K.jsonl")], "--data_dir"),
    ):
        monkeypatch.setattr(sys, "argv", ["quotations", *arguments])
        with pytest.raises(SystemExit) as stopped:
            flags.run(quotations.main)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and message in error


def test_a_forced_answer_is_given_token_for_token_under_every_cache(bundled_engine, made):
    one = min((one for one in made[1024] if one["task"] == "quote"), key=lambda one: len(one["answer"]))
    prompt = Prompt(one["text"], "here", "1K", one)
    found = {}
    for cache, config in settings(bundled_engine.models, [4]):
        engine = bundled_engine.with_config(config)
        found[cache] = measure(engine, prompt, 24, SamplingConfig())
        ids = engine.encode(one["text"])
        answer = engine.models.tokenizer(one["answer"], add_special_tokens=False, return_tensors="pt").input_ids[0]
        forced = engine.generate(ids, len(answer), processors=[Forced(len(ids), answer)])
        assert forced.token_ids == answer.tolist()
    assert list(found) == ["lookup", "full", "window 4", "CMR 4"]
    assert len({(one["text"], one["quoted"], one["known"]) for one in found.values()}) == 1  # lossless: the same answer
    assert all(one[FORCED] and min(one[FORCED]) >= 0 for one in found.values())
    text = tables(frame_of_scores({"length": "1K", "sample": 0, "cache": name} | of for name, of in found.items()))
    assert "answers forced" in text and "| CMR 4 |" in text and "| 4 chunks |" in text


def test_shares_count_four_words_in_a_row():
    assert share("a b c d e", "x a b c d y") == 0.5 and share("a b", "a b") == 0.0 and share("", "a") == 0.0


# Tables


def row(cache: str, sample: int, accepted: list[int], **about) -> dict:
    about = {"task": "quote", "depth": 0.5, "known": 0.75, "quoted": 0.25, "copied": 0.5} | about
    return {"length": "4K", "sample": sample, "cache": cache, FORCED: accepted, FREE: accepted[:1]} | about


def test_tables_sum_over_rounds_and_compare_prompt_by_prompt():
    records = [
        row("window 8", 0, [1, 1, 1, 1]), row("window 8", 1, [0], depth=0.9),
        row("CMR 8", 0, [2, 3, 2, 3]), row("CMR 8", 1, [1], depth=0.9), row("full", 0, [1]), row("lookup", 0, [4]),
    ]  # fmt: skip
    forced = tables(frame_of_scores(records)).partition("answers free")[0]
    assert "4K, 2 prompts" in forced and "| cache | 0.5 | 0.9 | quote | all |" in forced
    assert "| window 8 | 1.00 | 0.00 | 0.80 | 0.80 |" in forced and "| CMR 8 | 2.50 | 1.00 | 2.20 | 2.20 |" in forced
    assert [forced.index(f"| {name} |") for name in ("full", "lookup", "window 8", "CMR 8")] == sorted(
        forced.index(f"| {name} |") for name in ("full", "lookup", "window 8", "CMR 8")
    )
    assert "| 8 chunks | +1.50 | +1.00 | +1.25 ± 0.49 | +1.25 ± 0.49 |" in forced
    assert "| 4K, quote | 0.75 | 0.25 | 0.50 |" in tables(frame_of_scores(records))


def test_journals_of_evaluations_are_read_by_bucket_and_sample(tmp_path):
    about = {"task": "needle", "depth": 0.3, "answer": "1"}
    write_records(tmp_path / "data" / "q_1K.jsonl", ({"text": f"Prompt {n}."} | about for n in range(2)))
    prompts = {"1K": read_prompts(tmp_path / "data" / "q_1K.jsonl")}
    hashes = {("1K", n): hashlib.sha256(one.text.encode()).hexdigest() for n, one in enumerate(prompts["1K"])}
    journal = tmp_path / "mine.jsonl"
    write_journal(journal, "specextend", [record("1K", n, prompt_sha256=hashes["1K", n]) for n in range(2)])
    frame = frame_of_journals([journal], prompts, hashes)
    assert (
        frame[["task", "depth", "accepted", "rounds", "answer"]].values.tolist() == [["needle", "0.3", 4, 2, FREE]] * 2
    )
    assert "answers free" in tables(frame) and "Share that" not in tables(frame)
    with pytest.raises(InputError, match="was measured on other prompts"):
        frame_of_journals([journal], prompts, {})


def test_a_cache_is_named_by_who_keeps_what():
    for kind, name in (("retrieval", "CMR 16"), ("streaming", "window 16"), ("full", "full")):
        assert cache_of({"draft_cache": kind, "retrieval": {"top_k": 16}}) == name
    assert cache_of({"draft_cache": "full", "drafting": "lookup"}) == "lookup"
