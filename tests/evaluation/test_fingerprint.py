"""Models differ in their fingerprint when their weights do, and only then."""

from __future__ import annotations

import copy

import torch
from torch import nn

from specextend.evaluation.fingerprint import fingerprint
from specextend.modeling.packed import can_pack, pack_linears


def test_equal_weights_have_one_fingerprint_and_other_weights_another(make_model, perturbed):
    model = make_model("gqa")
    assert fingerprint(model) == fingerprint(copy.deepcopy(model))
    assert len({fingerprint(one) for one in (model, make_model("gqa", 1), perturbed(model, 1e-3))}) == 3


def test_a_change_in_one_packed_layer_shows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    if not can_pack(model):
        return
    changed = copy.deepcopy(model)
    changed[1].weight.data.mul_(1.01)
    before = fingerprint(model)
    for one in (model, changed):
        one.requires_grad_(False)
        pack_linears(one)
    assert fingerprint(model) == before != fingerprint(changed)
