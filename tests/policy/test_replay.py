"""Policies scored over recorded trees: the replay is what the loop does, and the price finds what pays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts.analysis.replay import FixedTree, load, machines, policies, record, replay, save
from specextend.config import SpecExtendConfig, TreeConfig
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


def test_recorded_trees_are_whole():
    for output in OUTPUTS:
        assert len(output.trees) == len(output.tokens) - 1
        for tree, token in zip(output.trees, output.tokens, strict=False):
            assert int(tree.tokens[0]) == token and np.isfinite(tree.logprobs).all() and (tree.logprobs <= 0).all()
