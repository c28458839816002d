"""Caches: what is written is found again, a tree's rows stay scratch until committed, prompts leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specextend.errors import CapacityError
from specextend.modeling.cache import DraftCache, KVCache, cache_shape
from specextend.modeling.rope import Rope

CPU = torch.device("cpu")
LAYERS, KV_HEADS, DIM = 2, 2, 16  # those of make_model("gqa")


def make_cache(make_model, capacity: int) -> KVCache:
    cache = KVCache(make_model("gqa").config, torch.float32, CPU)
    cache.reset(capacity)
    return cache


def rows(numbers: list[int], layer: int = 0) -> Tensor:
    """Keys [1, H_kv, T, D] in which every number, with its layer and head, can be read again."""
    base = torch.tensor(numbers, dtype=torch.float32)[None, None, :, None].expand(1, KV_HEADS, -1, DIM)
    return base + 1000 * layer + 100_000 * torch.arange(KV_HEADS)[None, :, None, None]


def write(cache: KVCache, numbers: list[int], start: int) -> None:
    for layer in range(LAYERS):
        cache.write(layer, rows(numbers, layer), -rows(numbers, layer), start)


def assert_holds(cache: KVCache, numbers: list[int]) -> None:
    assert cache.length == len(numbers)
    keys, values = cache.gather(torch.arange(len(numbers)))
    for layer in range(LAYERS):
        torch.testing.assert_close(cache.keys(layer), rows(numbers, layer), atol=0, rtol=0)
        torch.testing.assert_close(keys[layer], rows(numbers, layer), atol=0, rtol=0)
        torch.testing.assert_close(values[layer], -rows(numbers, layer), atol=0, rtol=0)


@pytest.mark.parametrize("kind, shape", [("mha", (2, 4, 16)), ("gqa", (2, 2, 16)), ("qwen3", (2, 2, 32))])
def test_cache_has_the_models_own_shape(kind, shape, make_model):
    assert cache_shape(make_model(kind).config) == shape


def test_cache_is_sized_by_kv_heads(make_model):
    assert make_cache(make_model, 100).nbytes == 2 * LAYERS * KV_HEADS * 100 * DIM * 4


def test_write_returns_committed_and_new_rows_and_commits_nothing(make_model):
    cache = make_cache(make_model, 20)
    write(cache, [1, 2, 3], 0)
    cache.length = 3
    keys, values = cache.write(1, rows([7, 8], 1), -rows([7, 8], 1), 3)
    torch.testing.assert_close(keys, rows([1, 2, 3, 7, 8], 1), atol=0, rtol=0)
    torch.testing.assert_close(values, -rows([1, 2, 3, 7, 8], 1), atol=0, rtol=0)
    assert_holds(cache, [1, 2, 3])


@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(1, 12), st.randoms(use_true_random=False)), max_size=8))
def test_cache_behaves_like_a_list_of_tokens(make_model, rounds):
    cache, expected = make_cache(make_model, 200), []
    for number, (nodes, random) in enumerate(rounds):
        tree = [100 * number + node for node in range(nodes)]
        write(cache, tree, cache.length)
        path = [0, *sorted(random.sample(range(1, nodes), random.randint(0, nodes - 1)))]
        cache.commit(torch.tensor(path))
        expected += [tree[node] for node in path]
        assert_holds(cache, expected)


def test_reset_forgets_and_reuses_the_memory(make_model):
    cache = make_cache(make_model, 50)
    write(cache, [1, 2], 0)
    cache.length = 2
    place = cache.keys(0).data_ptr()
    cache.reset(30)
    assert cache.length == 0 and cache.capacity == 50 and cache.keys(0).shape[2] == 0
    cache.length = 2
    assert cache.keys(0).data_ptr() == place
    cache.reset(51)
    assert cache.capacity == 51


def test_fill_replaces_everything(make_model):
    cache = make_cache(make_model, 20)
    write(cache, list(range(10)), 0)
    cache.length = 10
    keys, values = cache.gather(torch.tensor([2, 3, 9]))
    cache.fill(keys, values)
    assert_holds(cache, [2, 3, 9])


def test_gathered_rows_are_copies(make_model):
    cache = make_cache(make_model, 20)
    write(cache, [1, 2, 3], 0)
    keys, _ = cache.gather(torch.tensor([0, 2]))
    write(cache, [9, 9, 9], 0)
    torch.testing.assert_close(keys[0], rows([1, 3]), atol=0, rtol=0)


def test_token_beyond_the_capacity_is_our_own_mistake(make_model):
    with pytest.raises(AssertionError, match="does not fit a cache of 4"):
        write(make_cache(make_model, 4), [1, 2, 3], 2)


def test_cache_too_large_for_the_memory_says_so_and_stays_usable(make_model):
    cache = make_cache(make_model, 8)
    with pytest.raises(CapacityError, match=r"KV cache of 1000000000000 tokens needs 5\d+\.0 GB.*a shorter prompt"):
        cache.reset(10**12)
    cache.reset(8)
    write(cache, [1, 2], 0)
    cache.commit(torch.tensor([0, 1]))
    assert_holds(cache, [1, 2])


# ---- the draft's cache


@pytest.fixture
def make_draft_cache(make_model):
    def make(working_capacity: int | None) -> DraftCache:
        model = make_model("gqa")
        rope = Rope(model.get_decoder().rotary_emb, torch.float32, CPU)
        return DraftCache(model.config, rope, torch.float32, CPU, working_capacity)

    return make


def states(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, heads, tokens, DIM, generator=generator) for heads in (4, KV_HEADS, KV_HEADS))


def put_prompt(cache: DraftCache, tokens: int) -> tuple[Tensor, Tensor]:
    """A prompt without a window; its un-rotated keys and values, the same in both layers."""
    query, key, value = states(tokens)
    for layer in range(LAYERS):
        cache.append_prompt(layer, query, key, value, None)
    cache.commit_prompt(tokens)
    return key, value


@pytest.mark.parametrize("window", [None, 1, 4, 16])
@pytest.mark.parametrize("working", [None, 12])
def test_prompt_blocks_see_rotated_keys_of_the_window_before_them(working, window, make_draft_cache):
    cache = make_draft_cache(working)
    cache.reset(40, 8)
    query, key, value = states(24)
    for start in range(0, 24, 8):
        block = slice(start, start + 8)
        first = max(start - window + 1, 0) if window else 0
        rotated, keys, values = cache.append_prompt(0, query[:, :, block], key[:, :, block], value[:, :, block], window)
        torch.testing.assert_close(rotated, cache.rope.rotate(query[:, :, block], start))
        torch.testing.assert_close(keys, cache.rope.rotate(key[:, :, first : start + 8], first))
        torch.testing.assert_close(values, value[:, :, first : start + 8])
        cache.commit_prompt(8)
    assert cache.context == 24


def test_refresh_renumbers_the_chosen_tokens_from_zero(make_draft_cache):
    cache = make_draft_cache(12)
    cache.reset(60, 8)
    key, value = put_prompt(cache, 30)
    assert cache.context == 30 and cache.working.length == 0
    for positions in ([0, 1, 8, 9, 28, 29], [4, 29]):
        cache.refresh(torch.tensor(positions))
        assert cache.working.length == len(positions) and cache.context == 30
        _, values = cache.working.gather(torch.arange(len(positions)))
        for layer in range(LAYERS):
            expected = cache.rope.rotate(key[:, :, positions], 0)
            torch.testing.assert_close(cache.working.keys(layer), expected)
            torch.testing.assert_close(values[layer], value[:, :, positions])


def test_tokens_after_a_refresh_join_both_caches_and_survive_the_next(make_draft_cache):
    cache = make_draft_cache(12)
    cache.reset(60, 8)
    key, _ = put_prompt(cache, 30)
    cache.refresh(torch.tensor([3, 4, 29]))
    query, new, value = states(2, seed=1)
    for layer in range(LAYERS):
        rotated, keys, _ = cache.append(layer, query, new, value)
        torch.testing.assert_close(rotated, cache.rope.rotate(query, 3), msg="the new tokens continue at m")
        torch.testing.assert_close(keys[:, :, 3:], cache.rope.rotate(new, 3))
    cache.commit(2)
    assert cache.context == 32 and cache.working.length == 5
    cache.refresh(torch.tensor([10, 31]))
    expected = cache.rope.rotate(torch.cat((key[:, :, 10:11], new[:, :, 1:]), 2), 0)
    torch.testing.assert_close(cache.working.keys(0), expected)


def test_tree_in_the_working_cache_leaves_the_full_cache_alone(make_draft_cache):
    cache = make_draft_cache(12)
    cache.reset(60, 8)
    put_prompt(cache, 30)
    before = cache.full.gather(torch.arange(30))
    cache.refresh(torch.arange(22, 30))
    for layer in range(LAYERS):
        cache.working.write(layer, *states(5, seed=2)[1:], cache.working.length)
    torch.testing.assert_close(cache.full.gather(torch.arange(30)), before, atol=0, rtol=0)


def test_full_draft_cache_keeps_no_second_copy(make_draft_cache):
    cache = make_draft_cache(None)
    cache.reset(60, 8)
    put_prompt(cache, 30)
    assert cache.full is None and cache.context == cache.working.length == 30
    with pytest.raises(AssertionError, match="never refreshed"):
        cache.refresh(torch.tensor([0]))


def test_working_cache_holds_its_capacity_and_the_tree_whatever_the_prompt(make_draft_cache):
    cache = make_draft_cache(12)
    cache.reset(5000, 8)
    assert cache.working.capacity == 20 and cache.full.capacity == 5000
    buffer = cache.working.buffer
    cache.reset(5, 8)
    assert cache.working.buffer is buffer  # what was captured for one prompt serves the next


def test_reset_forgets_both_caches(make_draft_cache):
    cache = make_draft_cache(12)
    cache.reset(60, 8)
    put_prompt(cache, 30)
    cache.refresh(torch.arange(8))
    cache.reset(20, 8)
    assert cache.context == 0 and cache.working.length == 0
