"""Rotary embeddings against transformers' own: tabulated for drafts, exact per token for dynamic NTK."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specextend.drafting.small_lm import run_unrotated
from specextend.modeling.rope import DynamicRope, Rope, make_exact

CPU = torch.device("cpu")
KINDS = ("gqa", "linear", "llama3", "yarn", "qwen3")


def rotate_by_transformers(rotary, states: Tensor, positions: Tensor) -> Tensor:
    cos, sin = rotary(states, positions[None])
    return apply_rotary_pos_emb(states, states, cos, sin)[0]


def random_states(dim: int, tokens: int, heads: int = 3) -> Tensor:
    return torch.randn(1, heads, tokens, dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("start", [0, 1, 17, 2047, 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_rope_rotates_unrotated_states_as_transformers_does(kind, start, make_model):
    rotary = make_model(kind).get_decoder().rotary_emb
    states = random_states(make_model(kind).config.head_dim, 40)
    expected = rotate_by_transformers(rotary, states, torch.arange(start, start + 40))
    torch.testing.assert_close(Rope(rotary, torch.float32, CPU).rotate(states, start), expected, atol=2e-5, rtol=1e-5)


def test_yarn_scales_what_it_rotates(make_model):
    rotary = make_model("yarn").get_decoder().rotary_emb
    assert rotary.attention_scaling > 1.1
    states = random_states(16, 5)
    rotated = Rope(rotary, torch.float32, CPU).rotate(states, 0, same=True)
    torch.testing.assert_close(rotated, states * rotary.attention_scaling)


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_of_a_tree_level_all_get_one_position(kind, make_model):
    rotary = make_model(kind).get_decoder().rotary_emb
    rope, states = Rope(rotary, torch.float32, CPU), random_states(make_model(kind).config.head_dim, 6)
    level = rope.rotate(states, 33, same=True)
    singly = torch.cat([rope.rotate(states[:, :, n : n + 1], 33) for n in range(6)], 2)
    torch.testing.assert_close(level, singly, atol=0, rtol=0)


def test_query_and_key_are_rotated_alike(make_model):
    rope = Rope(make_model("gqa").get_decoder().rotary_emb, torch.float32, CPU)
    query, key = random_states(16, 4, heads=4), random_states(16, 4, heads=2)
    rotated = rope.rotate_pair(query, key, 9)
    torch.testing.assert_close(rotated, (rope.rotate(query, 9), rope.rotate(key, 9)), atol=0, rtol=0)


def test_table_that_grows_keeps_its_beginning(make_model):
    rope = Rope(make_model("llama3").get_decoder().rotary_emb, torch.float32, CPU)
    states = random_states(16, 10)
    before = rope.rotate(states, 100)
    rope.rotate(states, 20_000)
    torch.testing.assert_close(rope.rotate(states, 100), before, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_table_is_rounded_once(dtype, make_model):
    rotary = make_model("gqa").get_decoder().rotary_emb
    states = random_states(16, 10).to(dtype)
    rotated = Rope(rotary, dtype, CPU).rotate(states, 3000)
    assert rotated.dtype == dtype
    expected = rotate_by_transformers(rotary, states.float(), torch.arange(3000, 3010))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(rotated.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_model_run_without_rotation_hands_over_what_rotation_makes_the_models_own_keys(kind, make_model, make_prompt):
    model, prompt = make_model(kind), make_prompt(20)
    rope, seen = Rope(model.get_decoder().rotary_emb, torch.float32, CPU), []

    def attend(layer, query, key, value, scaling):
        if layer == 0:
            seen.append(key)
        return torch.zeros_like(query)

    run_unrotated(model, model.get_input_embeddings()(prompt), attend)
    model(input_ids=prompt[None], position_ids=torch.arange(7, 27)[None], use_cache=False, attend=attend)
    torch.testing.assert_close(rope.rotate(seen[0], 7), seen[1], atol=2e-5, rtol=1e-5)


# ---- dynamic NTK


def dynamic_rotary(trained: int = 64, factor: float = 2.0, **changes) -> LlamaRotaryEmbedding:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=trained,
        rope_parameters={"rope_type": "dynamic", "factor": factor, "rope_theta": 10000.0},
        **changes,
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("prompt", [1, 40, 63, 64, 65, 200])
def test_dynamic_rope_equals_transformers_step_by_step(prompt, factor):
    theirs, ours = dynamic_rotary(factor=factor), DynamicRope(dynamic_rotary(factor=factor))
    ours.prompt_length = prompt
    x = torch.zeros(1)
    steps = [theirs(x, torch.arange(prompt)[None])]
    steps += [theirs(x, torch.tensor([[position]])) for position in range(prompt, prompt + 80)]
    expected = [torch.cat(part, 1) for part in zip(*steps, strict=True)]
    positions = torch.arange(prompt + 80)
    for given, wanted in zip(ours(x, positions[None]), expected, strict=True):
        torch.testing.assert_close(given, wanted, atol=3e-5, rtol=0)


def test_dynamic_rope_of_a_token_does_not_depend_on_its_neighbours():
    rope, x = DynamicRope(dynamic_rotary()), torch.zeros(1)
    alone = rope(x, torch.tensor([[100]]))
    beside_a_deeper_node = [part[:, :1] for part in rope(x, torch.tensor([[100, 140]]))]
    torch.testing.assert_close(alone, tuple(beside_a_deeper_node), atol=0, rtol=0)
    theirs = dynamic_rotary()(x, torch.tensor([[100, 140]]))
    assert (theirs[0][:, :1] - alone[0]).abs().max() > 1e-3, "transformers has become exact: DynamicRope can go"


def test_dynamic_rope_follows_the_head_dim_of_the_config():
    theirs, ours = dynamic_rotary(head_dim=24), DynamicRope(dynamic_rotary(head_dim=24))
    ours.prompt_length = 100
    x, positions = torch.zeros(1), torch.arange(100)[None]
    torch.testing.assert_close(ours(x, positions), theirs(x, positions), atol=3e-5, rtol=0)


def test_make_exact_replaces_dynamic_rope_once_and_nothing_else(make_model):
    dynamic, plain = copy.deepcopy(make_model("dynamic")), make_model("llama3")
    make_exact(dynamic)
    replaced = dynamic.get_decoder().rotary_emb
    assert isinstance(replaced, DynamicRope)
    make_exact(dynamic)
    assert dynamic.get_decoder().rotary_emb is replaced
    before = plain.get_decoder().rotary_emb
    make_exact(plain)
    assert plain.get_decoder().rotary_emb is before
