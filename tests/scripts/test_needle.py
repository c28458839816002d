"""Needles (scripts.analysis.needle): planted where they should be, probed under each cache, resumed and counted."""

from __future__ import annotations

import json

import pytest
import torch

from scripts.analysis.needle import accuracies, measure, plant
from scripts.analysis.probe import Probe
from scripts.analysis.store import Store, require_positions
from scripts.report.analyses import CACHES
from scripts.train.facts import make_facts
from specextend.data.builtin import builtin_text
from specextend.errors import CapacityError, ConfigError, InputError


@pytest.fixture(scope="module")
def facts(bundled_models):
    return make_facts(3, bundled_models.tokenizer.backend_tokenizer, seed=1)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_statement_stands_at_its_depth_and_the_question_at_the_end(depth, facts):
    text = torch.full((600,), -1)
    for fact in facts:
        needle = plant(fact, text, 500, depth)
        statement, question = fact.statement.tolist(), fact.recall[: fact.answer.start].tolist()
        context = needle.context.tolist()
        assert len(context) + len(needle.answer) == 500 and context[-len(question) :] == question
        at = round(depth * (len(context) - len(statement) - len(question)))
        assert context[at : at + len(statement)] == statement and set(context) - {*statement, *question} == {-1}
        assert not set(statement) - set(question) & set(needle.without.tolist())
        assert needle.answer.tolist() == fact.recall[fact.answer].tolist()


def test_far_facts_are_known_by_retrieval_and_by_the_target_alone(facts, bundled_engine):
    text, probe = bundled_engine.encode(builtin_text()), Probe(bundled_engine)
    records = [{"length": "2K", "depth": 0.3} | measure(probe, plant(fact, text, 2048, 0.3)) for fact in facts]
    found = {cache: by_length["2K"] for cache, by_length in accuracies(records).items()}
    assert found["target"] == 1 and found["cmr"] > 2.5 * found["streaming"] and found["cmr"] > 4 * found["full"]
    for record in records:
        lengths = {len(record[cache][figure]) for cache in CACHES for figure in ("right", "nll")}
        assert len(lengths) == 1 and min(record["cmr"]["nll"]) >= 0


def test_accuracy_leaves_out_what_is_guessed_without_the_fact():
    half = {"right": [1, 0, 1], "nll": [0.1, 3.0, 0.1]}
    record = {"length": "4K", "depth": 0.5, "not_stated": {"right": [0, 0, 1]}} | {cache: half for cache in CACHES}
    assert accuracies([record]) == {cache: {"4K": 0.5} for cache in CACHES}


def test_records_are_measured_once_and_belong_to_one_setting(tmp_path):
    path = tmp_path / "records.json"
    assert Store(path, {"model": "a"}).measure({"n": 1}, lambda: {"x": 5}) == {"n": 1, "x": 5}
    again = Store(path, {"model": "a"})
    assert again.measure({"n": 1}, lambda: pytest.fail("measured twice")) == {"n": 1, "x": 5}
    again.measure({"n": 2}, lambda: {"x": 6})
    assert [record["x"] for record in json.loads(path.read_text())["records"]] == [5, 6]
    with pytest.raises(ConfigError, match="--fresh starts over"):
        Store(path, {"model": "b"})
    assert list(Store(path, {"model": "b"}, fresh=True)) == []
    path.write_text('{"records": ')
    with pytest.raises(InputError, match=f"{path} is damaged .*--fresh starts over"):
        Store(path, {"model": "a"})


def test_lengths_beyond_the_models_positions_are_refused(bundled_engine):
    require_positions(bundled_engine, ["2K", "16K"])
    with pytest.raises(CapacityError, match="32K is 32768 tokens, but bundled holds 16384 positions; ask for at most"):
        require_positions(bundled_engine, ["2K", "32K"])
    with pytest.raises(CapacityError, match="16K is 16384 tokens and 128 more, .* at most 16256"):
        require_positions(bundled_engine, ["16K"], 128)
