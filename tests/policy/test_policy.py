"""A price on time: costs, calibration, decisions, and that none of them changes a token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import backend_of
from hypothesis import given, settings
from hypothesis import strategies as st

from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.errors import ConfigError
from specextend.policy.calibration import CELLS, Calibration
from specextend.policy.costs import Costs, Curve, measure_curve
from specextend.policy.policies import LONGEST_PAUSE, Outcome, PricedTree
from specextend.trees.growth import Growth
from specextend.trees.host_tree import HostTree

MS = 1e-3
DRAFT = np.array([0.2, 0.2, 0.01]) * MS
CONFIG = TreeConfig(15, 6, 0.0, rule="price")


def costs(*verify: float, draft=DRAFT) -> Costs:
    """Costs of a target that verifies 1, 8, 16, 32 slots in so many ms, at any context."""
    return Costs(Curve((1, 8, 16, 32), (0, 1000), [[one * MS for one in verify]] * 2), draft)


# ---- costs


def test_costs_lie_on_lines_between_what_was_measured_and_beyond_it():
    curve = Curve((1, 5, 9), (100, 300), [[1, 3, 3], [2, 4, 8]])
    assert curve.upto(5, 100).tolist() == [1, 1.5, 2, 2.5, 3]
    assert curve.upto(9, 300)[[0, 4, 8]].tolist() == [2, 4, 8]
    assert curve.upto(9, 200)[8] == 5.5 and curve.upto(9, 500)[0] == 3
    assert curve.upto(13, 300)[12] == 12


def test_more_rows_never_cost_less_whatever_the_clock_said():
    curve = Curve((1, 4, 8), (10, 20), [[3, 2, 5], [4, 9, 6]])
    for context in (10, 15, 20, 100):
        assert (np.diff(curve.upto(16, context)) >= 0).all()


def test_sizes_that_no_tree_is_worth_are_not_measured():
    asked = []

    def run(rows: int, context: int) -> float:
        asked.append(rows)
        return rows * MS

    curve = measure_curve(run, (1, 4, 8, 64), (10, 20))
    assert 64 not in asked and curve.upto(8, 20)[-1] == pytest.approx(8 * MS)


def test_clocks_of_the_rounds_correct_what_was_measured():
    one = costs(5, 6, 7, 9)
    for _ in range(40):
        one.learn({"verify": 12 * MS, "draft": 2.4 * MS, "accept": MS}, (4, 4, 4), slots=8, context=50)
        one.learn({"verify": 10 * MS, "draft": 0.1 * MS}, None, slots=1, context=50)
    assert one.plain(50) == pytest.approx(10.1 * MS, rel=0.02)
    assert one.verify(8, 50)[-1] == one.verifying(8, 50) == pytest.approx(12 * MS, rel=0.02)
    assert one.verify(8, 50)[0] == one.verifying(1, 50)
    assert one.draft(3, 12) == pytest.approx(2.4 * MS, rel=0.1)


# ---- calibration


def test_nothing_learned_takes_the_draft_at_its_word():
    given_ = torch.linspace(-12, 0, 50, dtype=torch.float64)
    torch.testing.assert_close(Calibration()(given_), given_, atol=0.03, rtol=0.01)


@given(st.integers(0, 10**6), st.floats(0.3, 3.0))
def test_calibrated_probabilities_keep_their_order_and_come_near_the_truth(seed, power):
    random = np.random.default_rng(seed)
    one, truth = Calibration(), lambda p: p**power
    for _ in range(200):
        p = random.uniform(0.02, 0.98, 20)
        one.learn(np.log(p), random.uniform(size=20) < truth(p))
    asked = torch.linspace(-16, 0, 400, dtype=torch.float64)
    found = one(asked)
    assert (found.diff() >= -1e-12).all() and (found <= 0).all()
    p = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    assert (one(p.log()).exp() - truth(p)).abs().mean() < 0.08


def test_tables_and_calls_agree():
    one = Calibration()
    one.learn(np.log([0.9, 0.8, 0.1]), np.array([True, False, True]))
    knots = torch.tensor([-((k / 4) ** 2) for k in range(CELLS + 1)], dtype=torch.float64)
    torch.testing.assert_close(one(knots), torch.from_numpy(one.table.copy()))


# ---- decisions


def test_a_node_is_verified_if_it_earns_its_slot():
    policy = PricedTree(CONFIG, costs(4, 5, 6, 8), refresh_every=4)
    assert policy.plan(100) is not None
    chances = np.array([0.05, 0.5, 0.01, 0.2])
    slot = (5 - 4) / 7 * policy.price * MS  # 0.036
    assert policy.size(np.log(chances), 100) == (chances > slot).sum() == 3


def test_a_staircase_is_looked_at_to_its_end():
    # seven nodes of 0.08 do not pay the step at two slots, fifteen of them do
    flat = Costs(Curve((1, 2, 16), (0, 1000), [[4 * MS, 7 * MS, 7 * MS]] * 2), DRAFT)
    policy = PricedTree(CONFIG, flat, refresh_every=4)
    policy.plan(100)
    assert policy.size(np.log([0.08] * 7), 100) == 0
    assert policy.size(np.log([0.08] * 15), 100) == 15


def test_no_path_is_left_out_where_sizes_are_steps_whose_slots_are_paid_for():
    seconds = [[one * MS for one in (4, 5, 5, 6)]] * 2
    floors = [
        PricedTree(CONFIG, Costs(Curve((1, 8, 16, 32), (0, 1000), seconds, only=only), DRAFT), 4).plan(50).floor
        for only in (True, False)
    ]
    assert floors[0] == 0 < floors[1]


def test_dear_levels_need_more_gain_than_cheap_ones():
    cheap = PricedTree(CONFIG, costs(4, 5, 6, 8), refresh_every=4)
    dear = PricedTree(CONFIG, costs(4, 5, 6, 8, draft=np.array([2, 2, 0.1]) * MS), refresh_every=4)
    assert dear.plan(100).threshold > 5 * cheap.plan(100).threshold > 0


def test_levels_that_seem_to_cost_nothing_are_all_drafted():
    policy = PricedTree(CONFIG, costs(4, 5, 6, 8, draft=np.array([0.2, 1e-4, 0.0]) * MS), refresh_every=4)
    took = {"verify": 4 * MS, "draft": 0.0, "accept": 0.0, "host": 0.0}  # by the clocks of noisy rounds
    for levels in (1, 5):
        policy.costs.learn(took | {"draft": MS / levels}, (1,) * levels, slots=1, context=100)
    assert policy.costs.level == 0
    assert policy.plan(100).max_depth == CONFIG.max_depth


def rounds(policy: PricedTree, accepts: bool, count: int) -> list[bool]:
    """Whether each of `count` rounds speculated; the draft is sure of four children in a row, and wrong or right."""
    scores, places, nothing = np.log([1.0, 0.9, 0.9, 0.9, 0.9]), np.arange(5), np.empty(0)
    took = {"draft": 2.8 * MS, "verify": 5 * MS, "accept": 0.1 * MS, "host": 0.0}
    done = []
    for _ in range(count):
        growth = policy.plan(100)
        done.append(growth is not None)
        if growth is None:
            plain = {"draft": 0.0, "verify": 4 * MS, "accept": 0.1 * MS, "host": 0.0}
            policy.learn(Outcome(None, None, nothing, 0.0, 1, [7], plain, 100))
            continue
        reach = np.cumsum([0.0, *growth.calibration(torch.from_numpy(scores[1:])).tolist()])
        drafted = HostTree(places, places - 1, places, scores, reach)
        nodes = policy.size(reach[1:], 100)
        tokens = [1, 2, 3, 4, 50][: nodes + 1] if accepts else [50]
        policy.learn(Outcome(drafted, (1, 1, 1), nothing, drafted.expected(nodes), nodes + 1, tokens, took, 100))
    return done


def dear() -> PricedTree:
    return PricedTree(CONFIG, costs(4, 5, 6, 8, draft=np.array([1, 0.6, 0.01]) * MS), refresh_every=4)


def test_what_a_draft_that_is_always_wrong_costs_is_bounded():
    policy, tried = dear(), 0
    for done in range(200, 2200, 200):
        tried += sum(rounds(policy, accepts=False, count=200))
        assert tried <= 12 + 0.02 * done  # a trial loses less than one token, INTEREST may be lost
    assert tried > 12  # it is tried again and again


def test_a_draft_that_is_right_is_never_given_up_and_one_that_becomes_right_is_found():
    policy = dear()
    assert all(rounds(policy, accepts=True, count=100))
    assert 5 < sum(rounds(policy, accepts=False, count=200)) < 20
    rounds(policy, accepts=True, count=LONGEST_PAUSE + 20)
    assert np.mean(rounds(policy, accepts=True, count=100)) > 0.9


def test_a_new_prompt_begins_without_what_the_last_one_taught_of_its_text():
    policy = PricedTree(CONFIG, costs(4, 5, 6, 8), refresh_every=4)
    rounds(policy, accepts=True, count=100)
    policy.begin()
    assert policy.plan(100) is not None
    assert np.array_equal(policy.calibration.table, Calibration().table)


def test_a_prompt_after_hopeless_ones_begins_with_a_pause_and_a_price():
    policy = dear()
    for _ in range(4):
        rounds(policy, accepts=False, count=60)
        policy.begin()
    assert policy.plan(100) is None and policy.price >= 1 / policy.costs.plain(100)
    assert policy.size(np.log([0.05, 0.04]), 100) == 0 < policy.size(np.log([0.9, 0.8]), 100)
    assert any(rounds(policy, accepts=True, count=60))  # and finds out that this one is different


def test_what_verifying_every_slot_loses_is_time_that_the_nodes_left_out_do_not_earn():
    policy = PricedTree(CONFIG, costs(4, 5, 6, 8), refresh_every=4)
    policy.plan(100)
    for chances in ([0.9, 0.8, 0.7], [0.9, 0.1, 0.01], [0.01, 0.01, 0.01], [0.5]):
        verify = policy.costs.verify(CONFIG.nodes + 1, 100)
        gains = [sum(chances[:count]) - policy.price * (verify[count] - verify[0]) for count in range(len(chances) + 1)]
        whole = sum(chances) - policy.price * (verify[CONFIG.nodes] - verify[0])
        assert policy.loses(np.log(chances[::-1]), 100) == pytest.approx(max(gains) - whole)


def test_a_branch_that_says_it_all_spares_the_draft():
    policy = dear()
    rounds(policy, accepts=True, count=40)
    assert policy.plan(100) is not None
    assert (
        policy.spares(np.log([0.99] * 6)) and not policy.spares(np.log([0.2, 0.1])) and not policy.spares(np.empty(0))
    )


# ---- the tokens


class Dice:
    """A policy that decides at random."""

    price = 0.0

    def __init__(self, config: TreeConfig, seed: int):
        self._config, self._random = config, np.random.default_rng(seed)

    def begin(self) -> None:
        pass

    def plan(self, context: int) -> Growth | None:
        nodes, depth = self._random.integers(1, self._config.nodes + 1), self._random.integers(1, 7)
        bounds = Growth(int(nodes), int(depth), self._random.choice([0.0, 0.3]), self._random.choice([0.0, 0.05]))
        return bounds if self._random.uniform() < 0.4 else None

    def spares(self, branch: np.ndarray) -> bool:
        return self._random.uniform() < 0.3

    def size(self, reach: np.ndarray, context: int) -> int:
        return int(self._random.integers(0, min(len(reach), self._config.nodes) + 1))

    def learn(self, *_) -> None:
        pass


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    cache=st.sampled_from(["full", "streaming", "retrieval"]),
    length=st.integers(1, 90),
    noise=st.sampled_from([0.0, 0.3, 3.0]),
    sampling=st.sampled_from([SamplingConfig(), SamplingConfig(0.8, seed=3)]),
    branch=st.booleans(),
)
def test_no_decision_changes_a_token(
    seed, cache, length, noise, sampling, branch, make_model, perturbed, make_engine, make_prompt
):
    target = make_model("gqa")
    tree = TreeConfig(8, 6, 0.0, rule="price", lookup_branch=branch)
    config = SpecExtendConfig.specextend(draft_cache=cache, tree=tree, retrieval=RetrievalConfig(4, 3, 2))
    engine = make_engine(target, perturbed(target, noise), config)
    backend = backend_of(engine)
    backend._set_costs = lambda verify: None
    backend._policy = Dice(config.tree, seed)
    prompt = make_prompt(length, seed)
    plain = engine.autoregressive(prompt, 60, sampling=sampling)
    assert engine.generate(prompt, 60, sampling=sampling).token_ids == plain.token_ids


@pytest.mark.parametrize("cache", ["full", "retrieval"])
def test_priced_trees_keep_the_output_and_leave_no_hole_in_the_drafts_cache(
    cache, make_model, make_engine, make_prompt, monkeypatch
):
    """The draft is the target itself: whatever pauses there were, what it proposes next must be accepted."""
    target = make_model("gqa")
    config = SpecExtendConfig.specextend(
        draft_cache=cache, tree=TreeConfig(4, 3, 0.0, rule="price"), retrieval=RetrievalConfig(32, 32, 4)
    )
    engine = make_engine(target, target, config)
    engine.generate(make_prompt(20), 4)
    policy = backend_of(engine)._policy
    turns = iter([True, False] * 3 + [False] * 70 + [True] * 100)
    monkeypatch.setattr(policy, "plan", lambda context: Growth(4, 3, 0.0) if next(turns) else None)
    monkeypatch.setattr(policy, "size", lambda reach, context: len(reach))
    result = engine.generate(make_prompt(30), 120)
    assert result.token_ids == engine.autoregressive(make_prompt(30), 120).token_ids
    assert any(one.drafted == 0 for one in result.rounds)
    assert all(one.accepted >= 1 for one in result.rounds[:-1] if one.drafted)


def test_costs_are_measured_once_and_stand_in_no_figure(make_model, make_engine, make_prompt):
    engine = make_engine(make_model("gqa"), make_model("gqa"), SpecExtendConfig.specextend(tree=TreeConfig.priced()))
    first, second = (engine.generate(make_prompt(40), 10) for _ in range(2))
    assert first.capture_s > 0 == second.capture_s
    assert engine.generate(make_prompt(400), 4).capture_s > 0  # much longer than what was measured


def test_timing_that_is_interrupted_leaves_what_the_cache_holds(make_model, make_engine, make_prompt, monkeypatch):
    config = SpecExtendConfig.specextend(tree=TreeConfig(8, 3, 0.0, rule="price"))
    target = make_model("gqa")
    engine, fresh = (make_engine(target, target, config) for _ in range(2))
    prompt = make_prompt(460)
    engine.generate(prompt[:300], 4)

    def interrupted(run, rows, contexts):
        run(rows[-1], contexts[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("specextend.decoding.eager.measure_curve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(prompt, 4)
    found = engine.generate(prompt, 20)
    assert found.cached_tokens >= 300 and found.token_ids == fresh.generate(prompt, 20).token_ids


def test_price_and_bounds_are_not_mixed():
    with pytest.raises(ConfigError, match="leave it out"):
        TreeConfig(threshold=0.3, rule="price")
    with pytest.raises(ConfigError, match="choose one of"):
        TreeConfig(rule="luck")


def test_rounds_tell_their_price(make_model, make_engine, make_prompt):
    target = make_model("gqa")
    config = SpecExtendConfig.specextend(tree=TreeConfig.priced())
    priced = make_engine(target, target, config).generate(make_prompt(40), 20)
    assert all(one.price > 0 for one in priced.rounds) and priced.price > 0
    assert priced.nodes_per_round == np.mean([one.drafted for one in priced.rounds])
    assert priced.plain_share == np.mean([one.drafted == 0 for one in priced.rounds])
    fixed = make_engine(target, target, SpecExtendConfig.specextend()).generate(make_prompt(40), 20)
    assert fixed.price == 0
