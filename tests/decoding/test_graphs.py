"""Both backends decode the same, through Triton's interpreter: captured steps, run as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import RepetitionPenaltyLogitsProcessor  # noqa: E402

from scripts.bench.gpu import UnmovedTree  # noqa: E402
from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig  # noqa: E402
from specextend.decoding import backend as backend_module  # noqa: E402
from specextend.decoding.observer import Observer  # noqa: E402
from specextend.engine import SpecExtend  # noqa: E402
from specextend.methods import METHODS  # noqa: E402
from specextend.modeling.attention import HybridAttention  # noqa: E402
from specextend.modeling.cache import KVCache  # noqa: E402
from specextend.modeling.features import FeatureTap  # noqa: E402
from specextend.modeling.fused_prefill import FusedPrefillTarget  # noqa: E402
from specextend.modeling.target import Target  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="models of the tests are on the CPU"),
]
TREE, RETRIEVAL = TreeConfig(3, 2, 0.1), RetrievalConfig(4, 3, 2)
CAPTURED = [name for name in METHODS if name not in ("autoregressive_hf", "triforce")]


@pytest.fixture
def both(make_engine, monkeypatch):
    """both(target, draft, config): an engine per backend."""

    def make(target, draft, config: SpecExtendConfig) -> tuple[SpecExtend, SpecExtend]:
        with monkeypatch.context() as patch:
            eager = make_engine(target, draft, config)
            patch.setattr("specextend.engine.why_not_captured", lambda *_: None)
            graphs = make_engine(target, draft, config)
        assert (eager.backend, graphs.backend) == ("eager", "graphs")
        return eager, graphs

    return make


def assert_same(eager: SpecExtend, graphs: SpecExtend, prompt: torch.Tensor, new_tokens: int, **options) -> None:
    wanted, found = (engine.generate(prompt, new_tokens, **options) for engine in (eager, graphs))
    assert found.token_ids == wanted.token_ids
    assert [(one.drafted, one.accepted) for one in found.rounds] == [
        (one.drafted, one.accepted) for one in wanted.rounds
    ]


@pytest.fixture
def poisoned_memory():
    """Memory that nobody has written to reads as NaN, not as the zeros it mostly holds."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("method", CAPTURED)
def test_every_method_decodes_alike(method, both, make_model, perturbed, make_prompt):
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    config = METHODS[method].config(TREE, RETRIEVAL)
    if METHODS[method].chain:
        config = replace(config, tree=TreeConfig(2, 2))
    engines = both(target, perturbed(target, 0.3), config)
    for length in (21, 9):  # a second prompt finds the buffers as the first left them
        assert_same(*engines, make_prompt(length), 5)
    assert engines[1].generate(make_prompt(9), 2).capture_s == 0  # nothing was left to build


@settings(max_examples=6)
@given(
    method=st.sampled_from(CAPTURED),
    kind=st.sampled_from(["mha", "llama3", "mistral", "tied"]),
    length=st.integers(1, 30),
    tree=st.builds(TreeConfig, st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.0, 0.3])),
    sampling=st.sampled_from([SamplingConfig(), SamplingConfig(0.8, seed=5), SamplingConfig(1.2, top_p=0.9, top_k=20)]),
    noise=st.sampled_from([0.0, 0.3]),
)
def test_random_settings_decode_alike(
    method, kind, length, tree, sampling, noise, both, make_model, perturbed, make_prompt
):
    target = make_model(kind, head_dim=32, num_hidden_layers=1)
    config = METHODS[method].config(tree, RETRIEVAL)
    if METHODS[method].chain:
        config = replace(config, tree=TreeConfig(tree.max_depth, tree.max_depth))
    assert_same(*both(target, perturbed(target, noise), config), make_prompt(length), 4, sampling=sampling)


def test_the_baseline_decodes_alike(both, make_model, make_prompt):
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    eager, graphs = both(target, target, SpecExtendConfig.specextend(tree=TREE))
    for sampling in (SamplingConfig(), SamplingConfig(0.8, top_p=0.9, seed=3)):
        wanted, found = (one.autoregressive(make_prompt(20), 5, sampling=sampling) for one in (eager, graphs))
        assert found.token_ids == wanted.token_ids
        assert all(set(one.seconds) == {"draft", "verify", "accept", "host"} for one in found.rounds)


def test_a_policy_that_never_moves_writes_what_a_fixed_tree_does(both, make_model, perturbed, make_prompt, monkeypatch):
    monkeypatch.setattr(UnmovedTree, "threshold", TREE.threshold)
    monkeypatch.setattr("specextend.decoding.priced_graphs.PricedTree", UnmovedTree)
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    draft, settings = perturbed(target, 0.3), SpecExtendConfig.specextend(tree=TREE, retrieval=RETRIEVAL)
    _, fixed = both(target, draft, settings)
    _, unmoved = both(target, draft, replace(settings, tree=replace(TREE, threshold=0.0, rule="price")))
    wanted, found = (engine.generate(make_prompt(20), 16) for engine in (fixed, unmoved))
    assert unmoved.backend == "graphs" and found.token_ids == wanted.token_ids
    assert all(1 <= one.drafted <= TREE.nodes for one in found.rounds)


def test_processors_and_growing_caches(both, make_model, perturbed, make_prompt, monkeypatch):
    monkeypatch.setattr(backend_module, "RESERVED", 3)
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    engines = both(target, perturbed(target, 0.3), SpecExtendConfig.specextend(tree=TREE, retrieval=RETRIEVAL))
    assert_same(*engines, make_prompt(12), 12, processors=[RepetitionPenaltyLogitsProcessor(1.5)])


class Log(Observer):
    """What is told, whatever the order of a tree's nodes: nodes are the tokens on the way to them."""

    def __init__(self):
        self.told = []

    def refreshed(self, round, positions, context):
        self.told.append(("refreshed", round, positions.tolist(), context))

    def drafted(self, tree):
        self._nodes = [tuple(tree.tokens[row].tolist()) for row in tree.ancestors]
        self.told.append(("drafted", sorted(self._nodes)))

    def verified(self, tree, logits):
        choices = zip(self._nodes, logits.argmax(-1).tolist(), strict=True)
        self.told.append(("verified", sorted(choices)))

    def accepted(self, path):
        self.told.append(("accepted", [self._nodes[node] for node in path.tolist()]))


def test_observers_are_told_the_same(both, make_model, perturbed, make_prompt):
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    engines = both(target, perturbed(target, 0.3), SpecExtendConfig.specextend(tree=TREE, retrieval=RETRIEVAL))
    logs = [Log(), Log()]
    for engine, log in zip(engines, logs, strict=True):
        engine.generate(make_prompt(20), 5, observer=log)
    assert logs[0].told == logs[1].told and {event[0] for event in logs[0].told} >= {"refreshed", "accepted"}


@pytest.mark.parametrize("block", [0, 16], ids=["whole", "in blocks"])
@pytest.mark.parametrize("entering", [(0, 2), None], ids=["layers", "final state"])
def test_fused_prefill_is_the_targets(entering, block, make_model, make_prompt):
    model, hybrid = make_model("gqa", head_dim=32), HybridAttention()
    taps = [FeatureTap(model, entering) for _ in range(2)]
    caches = [KVCache(model.config, model.dtype, model.device) for _ in range(2)]
    prompt, makers = make_prompt(40), (Target, FusedPrefillTarget)
    plain, fused = (
        make(model, cache, hybrid, hybrid, block or None, tap)
        for make, cache, tap in zip(makers, caches, taps, strict=True)
    )
    torch.testing.assert_close(fused.prefill(prompt, 5), plain.prefill(prompt, 5))
    torch.testing.assert_close(caches[1].buffer[..., :40, :], caches[0].buffer[..., :40, :])
    torch.testing.assert_close(taps[1].take(), taps[0].take(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(fused.last_queries(), plain.last_queries())
