"""What a model's weights are, as a short hash: two trainings of one shape differ in it, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from specextend.modeling.packed import PackedLinear

SAMPLES = 256  # numbers of each weight, spread over it
DIGITS = 16


@torch.inference_mode()
def fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes, dtypes and a sample of the values of all weights; milliseconds where none is packed."""
    digest = hashlib.sha256()
    for name, weight in _weights(model):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        weight = weight.to_local() if isinstance(weight, DTensor) else weight  # of a sharded target: this rank's share
        flat = weight.data.reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
        digest.update(some.to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its own name, those of packed layers too, in the order of the names."""
    layers = sorted(model.named_modules(), key=lambda named: named[0])
    for name, layer in layers:
        plain = layer.unpacked() if isinstance(layer, PackedLinear) else layer
        for own, weight in plain.named_parameters(recurse=False):
            yield f"{name}.{own}", weight
