"""A few new tokens behind a known prefix are read by captured verifications, and more by a prefill."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import backend_of

pytest.importorskip("triton")

from specextend.config import RetrievalConfig, SpecExtendConfig, TreeConfig  # noqa: E402
from specextend.decoding.priced_graphs import PricedGraphs  # noqa: E402
from specextend.engine import SpecExtend  # noqa: E402
from specextend.modeling.prefixes import PrefixLimits  # noqa: E402
from specextend.policy.costs import Costs, Curve  # noqa: E402
from specextend.policy.policies import PricedTree  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="models of the tests are on the CPU"),
]
RETRIEVAL = RetrievalConfig(4, 3, 2)
FIXED = TreeConfig(3, 2, 0.1)
PRICED = TreeConfig(12, 2, 0.0, rule="price")


@pytest.fixture
def engine_of(make_engine, make_model, perturbed, monkeypatch):
    """engine_of(config): an engine whose rounds are captured and whose costs are known."""

    def set_costs(self, output) -> None:
        curve = Curve(self._sizes, (10, 100), [[4e-3] * len(self._sizes)] * 2, only=True)
        self._policy = PricedTree(self._config.tree, Costs(curve, np.array([2e-4, 2e-4, 0.0])), 2)

    monkeypatch.setattr(PricedGraphs, "_set_costs", set_costs)
    monkeypatch.setattr("specextend.engine.why_not_captured", lambda *_: None)
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    return lambda config: make_engine(
        target, perturbed(target, 0.3), config, prefix_reuse=PrefixLimits(copies=2, worth=4)
    )


def reads(engine: SpecExtend) -> list[tuple[str, int]]:
    """Grows by how, and how many tokens, every block of the target's prefill reads."""
    target, told = backend_of(engine)._host_target, []
    for name in ("_read", "_read_short"):

        def told_read(block, name=name):
            told.append((name, len(block)))
            return getattr(type(target), name)(target, block)

        setattr(target, name, told_read)
    return told


@pytest.mark.parametrize("tree, slots", [(FIXED, 4), (PRICED, 13)], ids=["fixed", "priced"])
def test_few_tokens_take_verifications(tree, slots, engine_of, make_prompt):
    config = SpecExtendConfig.specextend(tree=tree, retrieval=RETRIEVAL, draft_window=8)
    engine, document = engine_of(config), make_prompt(40)
    fresh = SpecExtend(engine.models, config, prefix_reuse=False)
    engine.generate(torch.cat((document, make_prompt(2 * slots + 2, seed=99))), 3)  # the buffer moves no more
    told = reads(engine)
    for new, blocks in ((1, [1]), (slots + 2, [slots, 2]), (2 * slots, [slots, slots])):
        question = torch.cat((document, make_prompt(new, seed=new)))
        answer, wanted = engine.generate(question, 3), fresh.generate(question, 3)
        assert told == [("_read_short", tokens) for tokens in blocks], new
        assert answer.cached_tokens == 40 and not answer.capture_s
        assert answer.token_ids == wanted.token_ids
        told.clear()
    engine.generate(torch.cat((document, make_prompt(2 * slots + 1, seed=1))), 1)
    assert told == [("_read", 2 * slots + 1)]
    told.clear()
    engine.generate(make_prompt(3, seed=9), 1)
    assert told == [("_read", 3)]  # nothing of it is known


def test_a_buffer_that_moved_and_dense_attention_take_a_prefill(engine_of, make_prompt):
    document = make_prompt(30)
    engine = engine_of(SpecExtendConfig.specextend(tree=FIXED, retrieval=RETRIEVAL, draft_window=8))
    engine.generate(document, 3)
    told, longer = reads(engine), torch.cat((document, make_prompt(2, seed=1)))
    answer = engine.generate(longer, 12)  # more than there is room for
    assert told == [("_read", 2)] and answer.token_ids == engine.autoregressive(longer, 12).token_ids
    standard = engine_of(SpecExtendConfig.standard(tree=FIXED))
    standard.generate(document, 3)
    told = reads(standard)
    assert standard.generate(longer, 3).cached_tokens == 30 and told == [("_read", 2)]
