"""Rounds of fused launches against the loop that looks at every value, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig  # noqa: E402
from specextend.decoding.graphs import CapturedDecoding, CapturedSpeculation  # noqa: E402
from specextend.modeling.cache import KVCache  # noqa: E402
from specextend.modeling.features import FeatureTap  # noqa: E402
from specextend.modeling.fused_prefill import FusedPrefillTarget  # noqa: E402
from specextend.modeling.target import Target  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="models of the tests are on the CPU; bench_gpu compares on a GPU"
    ),
]
GREEDY = SamplingConfig()
MAKERS = (Target, FusedPrefillTarget)


@pytest.mark.parametrize(
    ("kind", "draft_cache", "length", "sampling"),
    [
        ("mha", "full", 3, GREEDY),
        ("gqa", "retrieval", 40, GREEDY),
        ("llama3", "streaming", 40, GREEDY),
        ("mistral", "retrieval", 7, SamplingConfig(0.8, seed=5)),
    ],
)
def test_captured_rounds_are_the_rounds_of_the_loop(
    kind, length, draft_cache, sampling, make_model, perturbed, make_engine, make_prompt
):
    target, prompt = make_model(kind, head_dim=32), make_prompt(length)
    draft = perturbed(target, 0.3)
    config = SpecExtendConfig(
        flash_prefill=True, hybrid_tree_attention=True, draft_cache=draft_cache,
        tree=TreeConfig(4, 2, 0.1), retrieval=RetrievalConfig(8, 3, 2),
    )  # fmt: skip
    engine = make_engine(target, draft, config)
    wanted = engine.generate(prompt, 8, sampling=sampling)
    speculation = CapturedSpeculation(engine._target, engine._drafter, engine._retriever, config.tree)
    for _ in range(2):  # a second prompt finds the buffers as the first left them
        ids, output = engine._begin(prompt, 8, (), config.tree.nodes + 1)
        for _ in speculation(sampling, ids, output):
            pass
        found = output.result(None)
        assert found.token_ids == wanted.token_ids
        assert [one.accepted for one in found.rounds] == [one.accepted for one in wanted.rounds]
        assert all(set(one.seconds) - {"retrieve"} == {"draft", "verify", "accept", "host"} for one in found.rounds)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(0.8, top_p=0.9, seed=3)], ids=["greedy", "sampled"])
def test_captured_decoding_is_autoregressive_decoding(sampling, make_model, make_engine, make_prompt):
    target = make_model("gqa", head_dim=32)
    engine, prompt = make_engine(target, target, SpecExtendConfig.specextend()), make_prompt(30)
    wanted = engine.autoregressive(prompt, 8, sampling=sampling)
    ids, output = engine._begin(prompt, 8, (), 1)
    for _ in CapturedDecoding(engine._baseline)(sampling, ids, output):
        pass
    assert output.result(None).token_ids == wanted.token_ids


@pytest.mark.parametrize("block", [0, 16], ids=["whole", "in blocks"])
@pytest.mark.parametrize("entering", [(0, 2), None], ids=["layers", "final state"])
def test_fused_prefill_is_the_targets(entering, block, make_model, make_engine, make_prompt):
    model = make_model("gqa", head_dim=32)
    engine = make_engine(model, model, SpecExtendConfig.specextend())
    taps = [FeatureTap(model, entering) for _ in range(2)]
    caches = [KVCache(model.config, model.dtype, model.device) for _ in range(2)]
    prompt, parts = make_prompt(40), (engine._target._prefill_attention, engine._target._tree_attention, block or None)
    plain, fused = (make(model, cache, *parts, tap) for make, cache, tap in zip(MAKERS, caches, taps, strict=True))
    torch.testing.assert_close(fused.prefill(prompt, 5), plain.prefill(prompt, 5))
    torch.testing.assert_close(caches[1].buffer[..., :40, :], caches[0].buffer[..., :40, :])
    torch.testing.assert_close(taps[1].take(), taps[0].take(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(fused.last_queries(), plain.last_queries())
