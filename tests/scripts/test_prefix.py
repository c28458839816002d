"""The benchmark of prefix reuse says what happened: what was read, how long it took, whether anything changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.bench.prefix import SAMPLINGS, conversation, document_of, questions, returning, summary

RESULTS = Path(__file__).parents[2] / "results"


def test_a_short_document_is_measured(bundled_models):
    document = document_of(bundled_models, 150)
    first, *rest = questions(bundled_models, document, 3, True)
    turns = conversation(bundled_models, document, 3, True, SAMPLINGS["sampled"])
    assert first["cached_tokens"] < 10 and all(row["cached_tokens"] > 140 for row in rest)
    assert [row["cached_tokens"] > 140 for row in turns] == [False] + [True] * 9
    assert all(row["same_tokens"] and row["ttft_s"] > 0 for row in (first, *rest, *turns))
    again = returning(bundled_models, document_of(bundled_models, 300), document_of(bundled_models, 300, 1), True)
    assert again["cached_tokens"] > 290 and again["copies_bytes"] > 0
    found = summary({"questions": [first, *rest], "return": again, "conversations": {"sampled": turns}})
    assert found["second_over_first"] == rest[0]["ttft_s"] / first["ttft_s"] and found["turns"] == 10


@pytest.mark.parametrize("path", ["cpu/prefix.json", "cpu/prefix_smollm2.json", "h200/prefix.json"])
def test_the_committed_summary_is_that_of_the_record(path):
    record = json.loads((RESULTS / path).read_text())
    assert summary(record) == pytest.approx(record["summary"])
    parted = 0 if record["setting"]["dtype"] == "float32" else 1  # at a near-tie, of two ways to add up in float16
    assert record["summary"]["turns"] == 20 and record["summary"]["same_tokens"] == 20 - parted
    assert record["summary"]["question_over_whole"] < 0.05  # a second question's first token, over reading all
    turns = [row for rows in record["conversations"].values() for row in rows]
    kept, whole = (sum(row[name] for row in turns) for name in ("accepted_per_round", "whole_accepted_per_round"))
    assert kept == pytest.approx(whole, rel=0.1)  # priced trees go by the clock: not every round is the same one
