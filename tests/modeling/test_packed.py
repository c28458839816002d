"""Packed linear layers against plain ones, and what becomes of a model whose layers are packed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specextend.modeling.packed import PackedLinear, can_pack, pack_linears, weight_nbytes

pytestmark = pytest.mark.skipif(not can_pack(nn.Linear(2, 2)), reason="this PyTorch has no oneDNN")


@pytest.mark.parametrize("rows", [1, 2, 7, 13, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear_computes_what_the_linear_computes(rows, bias):
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 130, bias=bias).requires_grad_(False), torch.randn(1, rows, 96)
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
    packed = PackedLinear(linear)
    torch.testing.assert_close(packed(x).double(), exact, atol=1e-5, rtol=1e-5)
    assert torch.equal(packed.weight, linear.weight)


def test_packed_model_gives_the_same_logits_and_counts_its_weights(make_model, perturbed, make_prompt):
    model, packed = make_model("qwen2"), perturbed(make_model("qwen2"), 0)  # qwen2 has biases
    pack_linears(packed)
    assert not any(type(module) is nn.Linear for module in packed.modules())
    assert [name for name, _ in packed.named_modules()] == [name for name, _ in model.named_modules()]
    assert weight_nbytes(packed) == weight_nbytes(model) == sum(4 * weight.numel() for weight in model.parameters())
    prompt = make_prompt(9)[None]

    def logits(model):
        model.set_attn_implementation("sdpa")
        return model(prompt).logits

    torch.testing.assert_close(logits(packed), logits(perturbed(model, 0)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_as_they_are(dtype):
    model = nn.Sequential(nn.Linear(4, 4)).to(dtype)
    pack_linears(model)
    assert type(model[0]) is nn.Linear
