"""Partial products of several GPUs added up, the residual with them, and normed: one launch (Triton).

What follows a sharded product in a Llama block is all-reduce | residual | RMSNorm. The GPUs of a host read each other's
memory, so the program of a row reads it from all of them, in the same order everywhere: sums are the same to the bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specextend.kernels.linear import Norm


def add_and_norm(parts: Tensor, residual: Tensor, norm: Norm) -> Tensor:
    """RMSNorm [T, H] of `residual` [T, H] plus all parts, which `residual` becomes.

    Args:
        parts: [R] int64, addresses of the parts, each [T, H] in the residual's dtype, contiguous, at a multiple of 16
            bytes; on the device.
    """
    assert residual.is_contiguous() and parts.dtype == torch.int64
    rows, columns = residual.shape
    out, size = torch.empty_like(residual), triton.next_power_of_2(columns)
    _kernel[(rows,)](
        parts, residual, norm.weight, norm.epsilon, out, columns, COUNT=len(parts), SIZE=size,
        num_warps=16 if size > 4096 else 8,
    )  # fmt: skip
    return out


def add_and_norm_ref(parts: list[Tensor], residual: Tensor, norm: Norm) -> Tensor:
    """The definition; `parts` are tensors [T, H]."""
    total = residual.float()
    for part in parts:
        total = total + part.float()
    residual.copy_(total)
    wide = residual.float()
    normed = wide * (wide.square().mean(-1, keepdim=True) + norm.epsilon).rsqrt()
    return normed.to(norm.weight.dtype) * norm.weight


@triton.jit
def _kernel(parts, residual, gain, epsilon, out, columns, COUNT: tl.constexpr, SIZE: tl.constexpr):
    column = tl.arange(0, SIZE)
    inside = column < columns
    at = tl.program_id(0).to(tl.int64) * columns + column
    dtype = residual.dtype.element_ty
    total = tl.load(residual + at, inside, 0.0).to(tl.float32)
    for part in tl.static_range(COUNT):
        # told, since it is read from memory: otherwise a peer's numbers are read one by one
        address = tl.multiple_of(tl.load(parts + part).to(tl.pointer_type(dtype)), 16)
        total += tl.load(address + at, inside, 0.0, cache_modifier=".cg").to(tl.float32)
    rounded = total.to(dtype)
    tl.store(residual + at, rounded, inside)
    wide = rounded.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / columns + epsilon)
    weight = tl.load(gain + column, inside, 0.0)
    tl.store(out + at, normed.to(weight.dtype) * weight, inside)
