"""Every route of attention against float64 dense attention written out here, and no L x L tensor in a flash prefill."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specextend.config import RetrievalConfig, SpecExtendConfig, TreeConfig
from specextend.modeling.attention import (
    DenseAttention,
    HybridAttention,
    attention_row,
    band_attention,
    causal_flash_attention,
    flash_attention,
    masked_attention,
    merge,
)

ROUTES = {"dense": DenseAttention(), "hybrid": HybridAttention(), "hybrid reference": HybridAttention(fused=False)}
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (6, 1)}
DIM = 16
SCALING = 0.3  # not 1 / sqrt(D), so that a route that forgets it is seen


def exact(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float = SCALING):
    """Attention by its definition in float64, head by head: output [B, H, T, D], lse [B, H, T], weights [B, H, T, K]"""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    outputs, sums, weights = [], [], []
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // groups].mT * scaling
        exponentials = scores.exp() * visible
        total = exponentials.sum(-1)
        weights.append(exponentials / total[..., None])
        sums.append(total.log())
        outputs.append(weights[-1] @ value[:, head // groups])
    return torch.stack(outputs, 1), torch.stack(sums, 1), torch.stack(weights, 1)


def random_states(heads: str, queries: int, keys: int, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = HEADS[heads]
    shapes = (query_heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(1, h, n, DIM, generator=generator).to(dtype) for h, n in shapes]


def random_ancestors(nodes: int, seed: int = 0) -> Tensor:
    """Ancestor mask [T, T] of a random tree, by walking up from every node."""
    generator = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(0, node, (1,), generator=generator)) for node in range(1, nodes)]
    mask = torch.zeros(nodes, nodes, dtype=torch.bool)
    for node in range(nodes):
        above = node
        while above >= 0:
            mask[node, above] = True
            above = parents[above]
    return mask


def behind(prefix: int, mask: Tensor) -> Tensor:
    """[T, N + T] bool: N visible to all, then `mask`."""
    return torch.cat((torch.ones(len(mask), prefix, dtype=torch.bool), mask), 1)


def assert_close(given: tuple[Tensor, Tensor], expected: tuple, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(given[0].double(), expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(given[1].double(), expected[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tail", [1, 2, 7, 33, 64])
@pytest.mark.parametrize("prefix", [0, 1, 40, 1000])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("route", ROUTES)
def test_tree_attention_equals_float64_dense_attention(route, heads, prefix, tail):
    states, mask = random_states(heads, tail, prefix + tail), random_ancestors(tail)
    output, lse = ROUTES[route](*states, SCALING, tail, mask)
    assert output.dtype == torch.float32 and lse.dtype == torch.float32
    assert_close((output, lse), exact(*states, behind(prefix, mask)))


@pytest.mark.parametrize("tail", [1, 2, 64])
@pytest.mark.parametrize("prefix", [0, 1, 300])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("route", ROUTES)
def test_block_without_a_mask_is_causal(route, heads, prefix, tail):
    states = random_states(heads, tail, prefix + tail)
    causal = behind(prefix, torch.ones(tail, tail).tril().bool())
    assert_close(ROUTES[route](*states, SCALING, tail, None), exact(*states, causal))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("queries, tail", [(3, 9), (1, 5), (1, 1)])
def test_tree_level_attends_to_a_tail_longer_than_itself(route, queries, tail):
    states = random_states("gqa", queries, 20 + tail)
    mask = random_ancestors(tail, seed=1)[-queries:]
    assert_close(ROUTES[route](*states, SCALING, tail, mask), exact(*states, behind(20, mask)))


@settings(max_examples=60)
@given(st.sampled_from(sorted(HEADS)), st.integers(0, 90), st.integers(1, 64), st.integers(0, 10**6))
def test_all_routes_agree_for_any_tree(heads, prefix, nodes, seed):
    states, mask = random_states(heads, nodes, prefix + nodes, seed), random_ancestors(nodes, seed)
    expected = exact(*states, behind(prefix, mask))
    for attend in ROUTES.values():
        assert_close(attend(*states, SCALING, nodes, mask), expected)


@pytest.mark.parametrize("route", ROUTES)
def test_attention_reads_a_cache_whose_rows_are_not_contiguous(route):
    query, key, value = random_states("gqa", 5, 30)
    buffer = torch.full((2, 1, 2, 64, DIM), float("nan"))  # what lies beyond the view must not matter
    buffer[0, :, :, :30], buffer[1, :, :, :30] = key, value
    mask = random_ancestors(5)
    given_ = ROUTES[route](query.transpose(1, 2).contiguous().transpose(1, 2), *buffer[:, :, :, :30], SCALING, 5, mask)
    assert_close(given_, exact(query, key, value, behind(25, mask)))


@pytest.mark.parametrize("route", ["hybrid", "hybrid reference"])
def test_one_part_may_outweigh_the_other_by_far(route):
    query, key, value = random_states("mha", 4, 24)
    mask = random_ancestors(4)
    for part in (slice(0, 20), slice(20, 24)):
        lopsided = key.clone()
        lopsided[:, :, part] *= 30
        expected = exact(query, lopsided, value, behind(20, mask))
        assert_close(ROUTES[route](query, lopsided, value, SCALING, 4, mask), expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("route", ["hybrid", "hybrid reference"])
def test_half_precision_loses_at_most_twice_what_dense_attention_loses(route, heads, dtype):
    states, mask = random_states(heads, 16, 516, dtype=dtype), random_ancestors(16)
    expected, expected_lse, _ = exact(*states, behind(500, mask))
    output, lse = ROUTES[route](*states, SCALING, 16, mask)
    dense, _ = ROUTES["dense"](*states, SCALING, 16, mask)
    assert output.dtype == dtype and lse.dtype == torch.float32
    rounding = (expected.to(dtype).double() - expected).abs().max()
    lost = (dense.double() - expected).abs().max()
    assert (output.double() - expected).abs().max() <= 2 * max(lost, rounding)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.02, rtol=0)


@pytest.mark.parametrize("heads", HEADS)
def test_causal_flash_attention_equals_float64_dense_attention(heads):
    query, key, value = random_states(heads, 50, 50)
    output, lse = causal_flash_attention(query, key, value, SCALING)
    given_ = output.reshape(query.shape), lse.reshape(query.shape[:3])  # rows come stacked by group
    assert_close(given_, exact(query, key, value, torch.ones(50, 50).tril()))


@pytest.mark.parametrize("primitive", [flash_attention, masked_attention])
def test_unmasked_attention_equals_float64_dense_attention(primitive):
    states = random_states("mha", 9, 130)
    assert_close(primitive(*states, SCALING), exact(*states, torch.ones(9, 130)))


@pytest.mark.parametrize("window", [1, 2, 16, 100])
@pytest.mark.parametrize("heads", HEADS)
def test_band_attention_sees_the_window_and_nothing_else(heads, window):
    for queries in (1, 2, window, 3 * window):
        for before in {0, window // 2, window - 1}:
            states = random_states(heads, queries, before + queries)
            visible = torch.zeros(queries, before + queries)
            for row in range(queries):
                visible[row, max(before + row - window + 1, 0) : before + row + 1] = 1
            assert_close(band_attention(*states, SCALING, window), exact(*states, visible))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6))
def test_merge_of_two_softmaxes_is_the_softmax_over_both(first, second, seed):
    query, key, value = random_states("mha", 3, first + second, seed)
    parts = [
        exact(query, key[:, :, part], value[:, :, part], torch.ones(3, 1))[:2]
        for part in (slice(first), slice(first, None))
    ]
    merged = merge(*parts)
    expected = exact(query, key, value, torch.ones(3, first + second))
    torch.testing.assert_close(merged, expected[:2], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
def test_attention_row_is_the_head_mean_of_the_weights(heads, dtype):
    query, key, value = random_states(heads, 1, 200, dtype=dtype)
    _, lse, weights = exact(query, key, value, torch.ones(1, 200))
    row = attention_row(query[0, :, 0], lse[0, :, 0], key[0], SCALING)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.double(), weights[0, :, 0].mean(0), atol=1e-6, rtol=1e-5)
    assert float(row.sum()) == pytest.approx(1, abs=1e-5)


# ---- memory of a prefill


class LargestTensor(TorchDispatchMode):
    """Remembers the largest storage, in bytes, that any operation handed out."""

    def __init__(self):
        super().__init__()
        self.bytes, self.operation = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > self.bytes:
                self.bytes, self.operation = tensor.untyped_storage().nbytes(), func
        return result


LONG = 4096


def largest_in_prefill(make_engine, make_model, make_prompt, config: SpecExtendConfig) -> LargestTensor:
    """Of target and draft: the prompt, two rounds and their refreshes."""
    engine = make_engine(make_model("gqa"), make_model("gqa", seed=1, num_hidden_layers=1), config)
    with LargestTensor() as largest:
        engine.generate(make_prompt(LONG), 3)
    return largest


@pytest.mark.parametrize("block", [256, LONG])
@pytest.mark.parametrize("window", [0, 64])
def test_flash_prefill_allocates_nothing_quadratic_in_the_prompt(window, block, make_engine, make_model, make_prompt):
    config = SpecExtendConfig.specextend(
        prefill_block=block, draft_window=window, tree=TreeConfig(8, 3), retrieval=RetrievalConfig(top_k=8)
    )
    largest = largest_in_prefill(make_engine, make_model, make_prompt, config)
    slots = LONG + 3 + 8 + 1  # prompt, new tokens, tree with its root
    cache = 2 * 2 * 2 * slots * 16 * 4  # keys and values, layers, KV heads, tokens, head dim, bytes
    activation = block * 96 * 4  # the widest of a block: the feed-forward's 96
    assert largest.bytes <= max(cache, activation), f"{largest.operation} made {largest.bytes} bytes"
    assert cache < LONG * LONG / 4, "the caches hide a byte mask of the prompt"


@pytest.mark.parametrize("draft_cache", ["full", "retrieval"])
def test_dense_prefill_does_allocate_it(draft_cache, make_engine, make_model, make_prompt):
    config = SpecExtendConfig(draft_cache=draft_cache, tree=TreeConfig(8, 3))
    assert largest_in_prefill(make_engine, make_model, make_prompt, config).bytes >= LONG * LONG * 4


@pytest.mark.parametrize("setting", ["standard", "specextend"])
def test_prefill_computes_logits_of_the_last_position_only(setting, make_engine, make_model, perturbed, make_prompt):
    target = perturbed(make_model("gqa"), 0)
    engine = make_engine(target, target, getattr(SpecExtendConfig, setting)(prefill_block=100, draft_window=0))
    rows = []
    target.lm_head.register_forward_hook(lambda module, args, output: rows.append(math.prod(output.shape[:-1])))
    engine.generate(make_prompt(350), 1)
    assert set(rows) == {1}, "a prefill made logits of more than one position"
    assert len(rows) == (4 if setting == "specextend" else 1), "the draft's prefill needs no logits"
