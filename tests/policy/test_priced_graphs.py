"""Priced trees in captured steps, run as they are by Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import backend_of

pytest.importorskip("triton")

from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig  # noqa: E402
from specextend.decoding import priced_graphs as priced_module  # noqa: E402
from specextend.decoding.backend import unchanged  # noqa: E402
from specextend.decoding.observer import Observer  # noqa: E402
from specextend.decoding.priced_graphs import PricedGraphs  # noqa: E402
from specextend.drafting.captured import SmallLMDraft  # noqa: E402
from specextend.policy import costs as costs_module  # noqa: E402
from specextend.policy.costs import Costs, Curve  # noqa: E402
from specextend.policy.policies import PricedTree  # noqa: E402
from specextend.trees.growth import Growth  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="models of the tests are on the CPU"),
]


@pytest.fixture
def captured(make_engine, monkeypatch):
    """captured(target, draft, config): an engine whose rounds are captured."""

    def make(target, draft, config: SpecExtendConfig):
        with monkeypatch.context() as patch:
            patch.setattr("specextend.engine.why_not_captured", lambda *_: None)
            engine = make_engine(target, draft, config)
        assert engine.backend == "graphs"
        return engine

    return make


@pytest.fixture
def known_costs(monkeypatch):
    """Nothing is timed: the interpreter's clock says nothing, and it is slow."""

    def set_costs(self, output) -> None:
        sizes = self._sizes
        curve = Curve(sizes, (10, 100), [[4e-3 + 1e-4 * index for index in range(len(sizes))]] * 2, only=True)
        self._policy = PricedTree(self._config.tree, Costs(curve, np.array([2e-4, 2e-4, 0.0])), 2)

    monkeypatch.setattr(PricedGraphs, "_set_costs", set_costs)


def priced(nodes: int, depth: int, *, branch: bool = False, **settings) -> SpecExtendConfig:
    tree = TreeConfig(nodes, depth, 0.0, lookup_branch=branch, rule="price")
    return SpecExtendConfig.specextend(tree=tree, retrieval=RetrievalConfig(4, 3, 2), **settings)


@pytest.mark.usefixtures("known_costs")
@pytest.mark.parametrize(
    ("cache", "sampling", "branch"),
    [
        ("full", SamplingConfig(), False),
        ("streaming", SamplingConfig(0.8, seed=3), True),
        ("retrieval", SamplingConfig(), True),
    ],
)
def test_no_decision_changes_a_token(
    cache, sampling, branch, captured, make_model, perturbed, make_engine, make_prompt, monkeypatch
):
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    engine = captured(target, perturbed(target, 0.3), priced(4, 2, branch=branch, draft_cache=cache))
    random = np.random.default_rng(7)
    monkeypatch.setattr(PricedTree, "size", lambda self, reach, context: int(random.integers(0, len(reach) + 1)))
    plan = PricedTree.plan

    def thrown(self, context):
        plan(self, context)
        if random.uniform() < 0.5:
            return None
        return Growth(4, 2, random.choice([0.0, 0.4]), random.choice([0.0, 0.05]), self.calibration)

    monkeypatch.setattr(PricedTree, "plan", thrown)
    monkeypatch.setattr(PricedTree, "spares", lambda self, branch: len(branch) > 0 and random.uniform() < 0.3)
    monkeypatch.setattr(PricedTree, "earned", lambda self, branch, context: random.uniform(0, 0.5) * (len(branch) > 0))
    plain = make_engine(target, target, SpecExtendConfig()).autoregressive(make_prompt(15), 10, sampling=sampling)
    found = engine.generate(make_prompt(15), 10, sampling=sampling)
    assert found.token_ids == plain.token_ids
    assert 0 < found.plain_share < 1


@pytest.mark.usefixtures("known_costs")
@pytest.mark.parametrize("looking", [-1.0, 1.0], ids=["a look pays", "a look is dear"])
def test_a_tree_is_verified_unseen_where_a_look_does_not_earn_its_time(
    looking, captured, make_model, perturbed, make_engine, make_prompt, monkeypatch
):
    """What was verified is what the policy learns from."""
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    engine = captured(target, perturbed(target, 0.3), priced(4, 6, draft_cache="full"))
    unseen, drafted, learned = [], [], []
    draft_unseen, learn = SmallLMDraft.draft_unseen, PricedTree.learn

    def told_draft(self, run, levels):
        unseen.append(len(drafted))
        draft_unseen(self, run, levels)

    def told_learn(self, outcome):
        learned.append(outcome)
        learn(self, outcome)

    class Trees(Observer):
        def drafted(self, tree):
            drafted.append(tree)

    monkeypatch.setattr(SmallLMDraft, "draft_unseen", told_draft)
    monkeypatch.setattr(PricedTree, "learn", told_learn)
    timed = property(lambda self: looking, lambda self, seconds: None)
    monkeypatch.setattr(PricedGraphs, "_looking", timed, raising=False)
    monkeypatch.setattr(PricedTree, "_learn_gain", lambda self, gain: None)  # never pauses
    plain = make_engine(target, target, SpecExtendConfig()).autoregressive(make_prompt(15), 12)
    found = engine.generate(make_prompt(15), 12, observer=Trees())
    assert found.token_ids == plain.token_ids
    assert 0 not in unseen and (len(unseen) > len(drafted) / 2 if looking > 0 else not unseen)
    for number in set(unseen) & set(range(len(learned))):
        tree, outcome = drafted[number], learned[number]
        assert outcome.drafted.tokens.tolist() == tree.tokens.tolist()
        assert outcome.drafted.parents.tolist() == tree.parents.tolist()
        assert outcome.verified == 5 and found.rounds[number].drafted == len(tree) - 1
        assert outcome.promised == pytest.approx(outcome.drafted.expected(len(tree)))


@pytest.mark.usefixtures("known_costs")
def test_a_branch_goes_on_where_the_draft_is_always_wrong(captured, make_model, opposed):
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    engine = captured(target, opposed(target), priced(4, 3, branch=True, draft_cache="full"))
    says = [3, 1, 4]

    def again(ids, scores):
        wanted = torch.full_like(scores, -torch.inf)
        wanted[:, says[ids.shape[1] % 3]] = 0.0
        return wanted

    result = engine.generate(torch.tensor(says * 6), 24, processors=[again])
    assert result.token_ids == says * 8
    assert max(one.accepted for one in result.rounds) == 3 and len(result.rounds) < 14


@pytest.mark.usefixtures("known_costs")
def test_a_pause_leaves_no_hole_in_the_drafts_cache(captured, make_model, make_prompt, monkeypatch):
    """The draft is the target itself: whatever pauses there were, what it proposes next must be accepted."""
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    engine = captured(target, target, priced(2, 2, draft_cache="full"))
    turns = iter([True, False, True, *[False] * 4, *[True] * 9])
    growth, plan = Growth(2, 2, 0.0), PricedTree.plan
    monkeypatch.setattr(
        PricedTree,
        "plan",
        lambda self, context: (
            replace(growth, calibration=self.calibration) if plan(self, context) and next(turns) else None
        ),
    )
    monkeypatch.setattr(PricedTree, "_learn_gain", lambda self, gain: None)
    result = engine.generate(make_prompt(12), 14)
    assert [one.drafted > 0 for one in result.rounds][:8] == [True, False, True, False, False, False, False, True]
    assert all(one.accepted >= 1 for one in result.rounds[:-1] if one.drafted)


@pytest.mark.usefixtures("known_costs")
def test_steps_are_captured_anew_whatever_waits_for_the_draft(
    captured, make_model, make_engine, make_prompt, monkeypatch
):
    """A cache may grow where as many tokens wait as can: trying the steps must find room for one more."""
    monkeypatch.setattr("specextend.decoding.backend.RESERVED", 6)
    monkeypatch.setattr(PricedTree, "plan", lambda self, context: None)
    waiting = []

    def tried(self):
        if hasattr(self, "_unread"):
            waiting.append(self._unread)
        with unchanged(*self._state):
            self._each_step(lambda name, step: step())
        self._graphs = {"none of a round's": lambda: None}

    monkeypatch.setattr(PricedGraphs, "_capture", tried)
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    engine = captured(target, target, priced(2, 2, draft_cache="full"))
    plain = make_engine(target, target, SpecExtendConfig()).autoregressive(make_prompt(12), 9)
    assert engine.generate(make_prompt(12), 9).token_ids == plain.token_ids
    assert waiting == [backend_of(engine)._slots.path]
    assert engine.generate(make_prompt(12), 9).token_ids == plain.token_ids and len(waiting) == 1  # there is room now


def test_costs_are_measured_once(captured, make_model, make_prompt, monkeypatch):
    monkeypatch.setattr(costs_module, "REPEATS", 1)
    monkeypatch.setattr(priced_module, "REPEATS", 1)
    monkeypatch.setattr(priced_module, "SHORT", 2)
    model = make_model("gqa", head_dim=32, num_hidden_layers=1)
    engine = captured(model, model, priced(2, 2, draft_cache="full"))
    first, second = (engine.generate(make_prompt(6), 4) for _ in range(2))
    assert first.capture_s > 0 == second.capture_s
    assert first.token_ids == second.token_ids
    known = backend_of(engine)._policy.costs
    assert known.level > 0 and known.plain(6) > 0 and known.size(2, 6) == 3
