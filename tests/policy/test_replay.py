"""Policies scored over recorded trees: the replay is what the loop does, and the price finds what pays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.analysis.replay import (
    FixedTree,
    calibration_error,
    load,
    machines,
    policies,
    record,
    replay,
    save,
    scores,
    table_of,
)
from specextend.config import SpecExtendConfig, TreeConfig
from specextend.evaluation.environment import ROOT
from specextend.trees.growth import Growth

OUTPUTS = load(Path(__file__).with_name("trees.npz"))


def test_a_replay_makes_the_rounds_that_the_engine_makes(make_model, perturbed, make_engine, make_prompt, tmp_path):
    target = make_model("gqa")
    draft, prompt = perturbed(target, 0.1), make_prompt(40)
    priced = SpecExtendConfig.specextend(draft_cache="full", tree=TreeConfig(63, 12, 0.0, rule="price"))
    recorded = record(make_engine(target, draft, priced), {"one": prompt}, 40, 0.0)
    save(tmp_path / "trees.npz", recorded)
    (output,) = load(tmp_path / "trees.npz")
    tree = TreeConfig(6, 4, 0.2)
    result = make_engine(target, draft, SpecExtendConfig.specextend(draft_cache="full", tree=tree)).generate(prompt, 40)
    assert output.tokens == result.token_ids
    score = replay(FixedTree(tree), output, next(iter(machines().values())))
    assert (score.tokens, score.rounds) == (39, len(result.rounds))


@pytest.mark.parametrize("machine", machines())
@pytest.mark.parametrize("output", OUTPUTS, ids=lambda one: one.name)
def test_the_price_comes_near_the_best_fixed_tree_in_hindsight(machine, output):
    costs = machines()[machine]
    found = {name: replay(policy, output, costs).speedup for name, policy in policies(costs)}
    assert found["priced"] >= 0.92 * max(1.0, *found.values()), found


@pytest.mark.parametrize("machine", machines())
def test_a_policy_that_never_speculates_costs_what_autoregressive_decoding_costs(machine):
    class Off(FixedTree):
        def plan(self, context: int) -> Growth | None:
            return None

    for output in OUTPUTS:
        score = replay(Off(TreeConfig()), output, machines()[machine])
        assert score.speedup == pytest.approx(1) and score.plain_rounds == score.rounds == len(output.tokens) - 1


def test_the_error_of_probabilities_is_what_bins_are_off_by():
    assert calibration_error(np.array([0.25, 0.25, 0.25, 0.25]), np.array([True, False, False, False])) == 0
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, False])) == 0.5
    assert calibration_error(np.array([0.1, 0.9]), np.array([True, True])) == pytest.approx((0.9 + 0.1) / 2)
    assert calibration_error(np.empty(0), np.empty(0, dtype=bool)) == 0


def test_paths_are_accepted_as_often_as_is_said():
    costs = next(iter(machines().values()))
    priced = [replay(dict(policies(costs))["priced"], output, costs) for output in OUTPUTS]
    said, came = (np.concatenate([one for score in priced for one in getattr(score, of)]) for of in ("said", "came"))
    assert len(said) > 1000 and came.any() and calibration_error(said, came) < 0.06
    assert sum(int(one.sum()) for score in priced for one in score.came) >= sum(
        score.tokens - score.rounds for score in priced
    )  # what was verified is a part of what was drafted


def test_the_committed_table_is_that_of_the_recorded_trees():
    record = json.loads((ROOT / "results" / "cpu" / "replay.json").read_text())
    found = table_of(scores(OUTPUTS)).reset_index().to_dict(orient="records")
    assert record["trees"] == ["trees.npz"] and len(record["rows"]) == len(found) == 20
    for row, wanted in zip(record["rows"], found, strict=True):
        names = {key for key, value in wanted.items() if isinstance(value, str)}
        assert row.keys() == wanted.keys() and all(row[key] == wanted[key] for key in names) and len(names) == 3
        assert [row[key] for key in row if key not in names] == pytest.approx(
            [wanted[key] for key in row if key not in names], rel=1e-6
        )


def test_recorded_trees_are_whole():
    for output in OUTPUTS:
        assert len(output.trees) == len(output.tokens) - 1
        for tree, token in zip(output.trees, output.tokens, strict=False):
            assert int(tree.tokens[0]) == token and np.isfinite(tree.logprobs).all() and (tree.logprobs <= 0).all()
