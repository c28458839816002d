"""Partial products of several GPUs added up, the residual with them, and normed: one launch (Triton).

What follows a sharded product in a Llama block is all-reduce | residual | RMSNorm. The GPUs of a host read each other's
memory, so the program of a row reads it from all of them, in the same order everywhere: sums are the same to the bit.

Parts must be complete before they are read. Either a barrier was launched before, or the programs of a row tell each
other: each sends its count of sums so far to every peer and waits until every peer's count has come as far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specextend.kernels.elementwise import Norm

PATIENCE = tl.constexpr(1 << 26)  # looks at a peer's count, the better part of a microsecond each; then it goes on


@dataclass(frozen=True)
class Signals:
    """How the programs of a row tell each other that their parts are complete.

    Args:
        flags: [R] int64, addresses of each rank's [R, S] int32 that its peers can write, S >= T; on the device.
        counts: [S] int32, sums so far by row; starts as zeros, as the flags do.
        rank: of this process.
    """

    flags: Tensor
    counts: Tensor
    rank: int


def add_and_norm(parts: Tensor, residual: Tensor, norm: Norm, signals: Signals | None = None) -> Tensor:
    """RMSNorm [T, H] of `residual` [T, H] plus all parts, which `residual` becomes.

    Args:
        parts: [R] int64, addresses of the parts, each [T, H] in the residual's dtype, contiguous, at a multiple of 16
            bytes; on the device.
        signals: None where all parts are known to be complete.
    """
    assert residual.is_contiguous() and parts.dtype == torch.int64
    rows, columns = residual.shape
    out, size = torch.empty_like(residual), triton.next_power_of_2(columns)
    _kernel[(rows,)](
        parts, residual, norm.weight, norm.epsilon, out, columns,
        signals.flags if signals else parts, signals.counts if signals else parts,
        signals.rank if signals else 0, len(signals.counts) if signals else 0,
        COUNT=len(parts), SIZE=size, SIGNALS=signals is not None, num_warps=16 if size > 4096 else 8,
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
def _kernel(
    parts, residual, gain, epsilon, out, columns, flags, counts, rank, slots,
    COUNT: tl.constexpr, SIZE: tl.constexpr, SIGNALS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.arange(0, SIZE)
    inside = column < columns
    at = row.to(tl.int64) * columns + column
    dtype = residual.dtype.element_ty
    total = tl.load(residual + at, inside, 0.0).to(tl.float32)
    if SIGNALS:
        _meet(flags, counts, rank, slots, row, COUNT)
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


@triton.jit
def _meet(flags, counts, rank, slots, row, COUNT: tl.constexpr):
    """Until the programs of `row` on all ranks have come here as often as this one."""
    count = tl.load(counts + row) + 1
    tl.debug_barrier()
    tl.store(counts + row, count)
    for peer in tl.static_range(COUNT):
        there = tl.load(flags + peer).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(there + rank * slots + row, count, sem="release", scope="sys")
    here = tl.load(flags + rank).to(tl.pointer_type(tl.int32))
    for peer in tl.static_range(COUNT):
        looks = 0
        seen = tl.atomic_add(here + peer * slots + row, 0, sem="acquire", scope="sys")
        while (seen < count) & (looks < PATIENCE):
            seen = tl.atomic_add(here + peer * slots + row, 0, sem="acquire", scope="sys")
            looks += 1
