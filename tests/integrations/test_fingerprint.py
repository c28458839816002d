"""A fingerprint is equal while nothing changed, and different after any change."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from specextend.integrations.fingerprint import LANES, fingerprint


def of(tensor: torch.Tensor) -> tuple:
    """The contents' part alone: tensors of one place may still differ."""
    module = nn.Module()
    module.weight = nn.Buffer(tensor)
    return fingerprint(module)[1]


@pytest.mark.parametrize("kind", ["tied", "qwen2", "qwen3", "mistral", "llama3", "dynamic", "yarn"])
def test_untouched_models_of_every_family_keep_theirs(kind, make_model, hf_twin, make_prompt):
    model = hf_twin(make_model(kind))
    first = fingerprint(model)
    model.generate(make_prompt(20)[None], max_new_tokens=2, pad_token_id=0)
    model.requires_grad_(True).train().eval()
    assert fingerprint(model) == first
    model.model.norm.weight.data[3] += 1e-6
    assert fingerprint(model) != first


@given(st.data(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8]))
def test_every_change_of_contents_is_noticed(data, dtype):
    length = data.draw(st.integers(2, 70))
    tensor = torch.randn(length, generator=torch.Generator().manual_seed(length)).mul(9).to(dtype)
    changed = tensor.clone()
    one, two = (data.draw(st.integers(0, length - 1)) for _ in "ab")
    match data.draw(st.sampled_from(["add", "negate", "negate all", "swap", "roll", "bits"])):
        case "add":
            changed[one] += 1
        case "negate":
            changed[[one, two]] *= -1
        case "negate all":
            changed = -changed
        case "swap":
            changed[[one, two]] = changed[[two, one]]
        case "roll":
            changed = changed.roll(one)
        case "bits":
            changed.view(torch.uint8)[one] ^= 1 << data.draw(st.integers(0, 7))
    same = torch.equal(tensor.view(torch.uint8), changed.view(torch.uint8))
    assert (of(tensor) == of(changed)) == same


@pytest.mark.parametrize("pair", [1, 2, 4, 8, 1024])
def test_signs_of_many_weights_at_once_are_noticed(pair):
    """Sign bits of upper halves alone would cancel in one sum of 64 bits."""
    tensor = torch.ones(4096)
    changed = tensor.clone()
    changed.view(-1, 2)[:pair, 1] *= -1
    assert of(tensor) != of(changed)


def test_parts_and_views_are_read_in_their_place():
    tensor = torch.zeros(4 * LANES["cpu"], dtype=torch.int64)
    assert len({of(tensor.index_fill(0, torch.tensor([place * LANES["cpu"]]), 1)) for place in range(4)}) == 4
    odd = torch.arange(33, dtype=torch.float16)
    assert of(odd[1:]) == of(odd[1:].clone()) != of(odd[:32])  # of memory no 8 bytes begin at
    square = torch.arange(64.0).view(8, 8)
    assert of(square.T) == of(square.T.contiguous()) != of(square)
    assert of(torch.tensor(2.5)) != of(torch.tensor(2.0))
    of(torch.empty(0))


def test_attributes_of_any_kind_are_read_and_what_cannot_be_makes_it_unequal():
    class Setting:
        def __init__(self):
            self.scales = {"a": [1.0]}

    module = nn.Linear(2, 2)
    module.setting, module.rule = Setting(), functools.partial(torch.add, alpha=2)
    module.names = {"x", "y"}
    module.again = module.setting
    factor = [3.0]
    module.act = lambda x: x * factor[0]
    seen = [fingerprint(module)]
    assert fingerprint(module) == seen[0]
    for change in (
        lambda: module.setting.scales["a"].append(2.0),
        lambda: factor.__setitem__(0, 4.0),
        lambda: setattr(module, "rule", functools.partial(torch.add, alpha=3)),
        lambda: module.names.add("z"),
        lambda: setattr(module, "again", Setting()),
        lambda: setattr(module, "act", torch.relu),
        lambda: setattr(module, "flag", 1),
        lambda: setattr(module, "flag", True),
    ):
        change()
        seen.append(fingerprint(module))
        assert fingerprint(module) == seen[-1]
    assert len(set(seen)) == len(seen)
    module.lock = threading.Lock()
    assert fingerprint(module) != fingerprint(module)
