"""Linear layers for few rows on a CPU: weights packed once in oneDNN's own layout.

Verifying a tree multiplies some ten rows by every weight. PyTorch's default product for float32 reads a weight anew
in its plain layout, and with ten rows takes several times as long as with weights packed for the processor
(`scripts.bench.cpu` measures it: results/cpu/layers.json).
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

import torch
from torch import Tensor, nn

ROWS = 8  # the packing is chosen for products of about this many rows, and holds for any number


class PackedLinear(nn.Module):
    """What `linear` computes in float32, for inference; its weight lives on in the packed copy only."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # no buffer: the packed layout must survive `Module.to`
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()

    @property
    def nbytes(self) -> int:
        return 4 * self.out_features * (self.in_features + (self._bias is not None))

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], unpacked: a copy."""
        return self._weight.to_dense()

    @property
    def bias(self) -> Tensor | None:
        return self._bias

    def unpacked(self) -> nn.Linear:
        """The layer it was made of, with a copy of the weight."""
        linear = nn.Linear(self.in_features, self.out_features, self._bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self._bias is not None:
            linear.bias = nn.Parameter(self._bias, requires_grad=False)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Replace every linear layer of `model` by its packed form where that is possible; the module tree stays."""
    if not can_pack(model):
        return
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
    return_freed_memory()


def can_pack(model: nn.Module) -> bool:
    """Float32 on a CPU, with a PyTorch that has oneDNN."""
    weight = next(model.parameters())
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def return_freed_memory() -> None:
    """Give what was freed piece by piece back to the system; glibc keeps such pieces unless it is asked."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def weight_nbytes(model: nn.Module) -> int:
    """Bytes of all weights `model` holds, packed ones included."""
    packed = sum(module.nbytes for module in model.modules() if isinstance(module, PackedLinear))
    return packed + sum(weight.nbytes for weight in model.parameters())
