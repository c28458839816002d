"""Products of a few rows with large weights, with what stands around them in a Llama block fused in (Triton).

A block over T <= 128 tree slots reads each weight once and does little else, so its time is the weights' bytes plus
what every launch costs. Beside its attention a block is

    RMSNorm | q/k/v, rotation, into the cache      o, residual | RMSNorm | gate/up, SiLU | down, residual

A tile is 2 * COLS output columns, two runs of COLS: from the halves of a head that a rotation mixes, or gate and up. A
single row is multiplied without the matrix unit and normed on the way: `W (x g / rms(x)) = (W (x g)) / rms(x)`, and
every program sees the row whole. Where there are fewer tiles than multiprocessors, the inner dimension is split; the
last program to arrive at a tile adds the parts up, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from specextend.kernels.elementwise import KeyValue, Norm, Placement, placed, put_heads, rms_norm

PLAIN, SWIGLU, ROTARY = 0, 1, 2
PROGRAMS = 132  # multiprocessors of an H200


@dataclass(frozen=True)
class Launch:
    """How a product is launched.

    Args:
        cols: output columns per run; a tile has two runs.
        depth: inner dimension per step.
        splits: programs that share the inner dimension of a tile.
        warps, stages: of a program.
    """

    cols: int = 32
    depth: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 4


class Workspace:
    """Room for the parts of split products; launches follow each other on one stream and share it."""

    def __init__(self, device: torch.device, elements: int = 1 << 23, tiles: int = 1 << 14):
        self.parts = torch.empty(elements, dtype=torch.float32, device=device)
        self.squares = torch.empty(tiles * 128, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(tiles, dtype=torch.int32, device=device)


def linear(
    x: Tensor, weight: Tensor, workspace: Workspace, *, residual: Tensor | None = None, active: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """[T, N]: `x` [T, K] times `weight` [N, K] transposed, plus `residual` [T, N].

    Args:
        active: [>= 1] float32, device; where its first is not positive, the launch ends at once and computes nothing.
    """
    out = x.new_empty(len(x), len(weight))
    launch = launch or launch_for(PLAIN, x, len(weight))
    tiles = triton.cdiv(len(weight), 2 * launch.cols)
    _run(PLAIN, x, weight, workspace, launch, tiles, None, out, residual=residual, active=active)
    return out


def swiglu(
    x: Tensor, weight: Tensor, workspace: Workspace, *, norm: Norm | None = None, active: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """[T, F]: SiLU(gate) * up of `x` [T, K], normed if asked; `weight` [2 F, K] holds gate over up."""
    x, norm = _normed(x, norm, active)
    out = x.new_empty(len(x), len(weight) // 2)
    launch = launch or launch_for(SWIGLU, x, len(weight))
    _run(SWIGLU, x, weight, workspace, launch, triton.cdiv(out.shape[1], launch.cols), norm, out, active=active)
    return out


def rotary(
    x: Tensor, weight: Tensor, workspace: Workspace, where: Placement, cache: KeyValue, *,
    norm: Norm | None = None, full: KeyValue | None = None, active: Tensor | None = None, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """Rotated queries [H, T, D] of `x` [T, K]; keys, rotated, and values go to `cache`, un-rotated to `full`, too.

    Args:
        weight: [(H + 2 H_kv) D, K], heads of q over those of k over those of v.
    """
    x, norm = _normed(x, norm, active)
    kv_heads, _, dim = cache.keys.shape
    out = x.new_empty(len(weight) // dim - 2 * kv_heads, len(x), dim)
    launch = launch or launch_for(ROTARY, x, len(weight), dim // 2)
    assert dim // 2 % launch.cols == 0, "a tile lies within a head"
    tiles = len(weight) // (2 * launch.cols)
    _run(ROTARY, x, weight, workspace, launch, tiles, norm, out, where=where, cache=cache, full=full, active=active)
    return out


def _normed(x: Tensor, norm: Norm | None, active: Tensor | None) -> tuple[Tensor, Norm | None]:
    """Several rows are normed in a launch of their own: beside the matrix unit's work it would take longer."""
    return (x, norm) if norm is None or len(x) == 1 else (rms_norm(x, norm, active), None)


def launch_for(kind: int, x: Tensor, columns: int, half: int = 0) -> Launch:
    """Tuned for 1 and 64 rows of half precision on an H200; steps shrink where tiles would outgrow the shared memory.

    Args:
        columns: N, of the weight; half: of a head's dimension, for ROTARY.
    """
    inner = x.shape[1]
    if len(x) == 1:
        launch = {PLAIN: Launch(8, 512, 2), SWIGLU: Launch(8, 1024, stages=3), ROTARY: Launch(16, 512)}[kind]
        return replace(launch, splits=min(launch.splits, triton.cdiv(inner, launch.depth)))
    cols = min(half, 32) if kind == ROTARY else 32
    tiles = triton.cdiv(columns, 2 * cols)
    depth, stages = (64, 4) if kind == SWIGLU or tiles > 2 * PROGRAMS else (128, 3 if kind == ROTARY else 6)
    depth = depth * 2 // x.itemsize // (2 if len(x) > 64 else 1)
    # a multiprocessor holds two programs of q/k/v, one of the other products
    most = {PLAIN: min(8, PROGRAMS // tiles), SWIGLU: 1, ROTARY: min(3, 2 * PROGRAMS // tiles)}[kind]
    splits = max(1, min(most, inner // depth))
    return Launch(cols, depth, splits, stages=stages)


def height_for(rows: int) -> int:
    """Rows of a tile: Hopper's matrix unit takes 64 at once, and 32 cost more than 64 there."""
    if rows == 1:
        return 1
    return 16 if rows <= 16 else 64 if rows <= 64 else 128


def _run(
    kind: int, x: Tensor, weight: Tensor, workspace: Workspace, launch: Launch, tiles: int, norm: Norm | None,
    out: Tensor, *, residual: Tensor | None = None, where: Placement | None = None, cache: KeyValue | None = None,
    full: KeyValue | None = None, active: Tensor | None = None,
) -> None:  # fmt: skip
    rows, inner = x.shape
    block = height_for(rows)
    assert rows <= block and weight.is_contiguous() and x.is_contiguous()
    assert tiles * launch.splits * block * 2 * launch.cols <= workspace.parts.numel() or launch.splits == 1
    turn, cached = where or Placement(x, x, x), cache or KeyValue(out, out)
    _kernel[(tiles, launch.splits)](
        x, weight, norm.weight if norm else x, norm.epsilon if norm else 0.0,
        residual if residual is not None else x, active if active is not None else x,
        workspace.parts, workspace.squares, workspace.arrived, rows, len(weight), inner,
        *placed(out, turn, cached, full),
        HEADS=out.shape[0] if kind == ROTARY else 1, KV_HEADS=cached.keys.shape[0] if kind == ROTARY else 1,
        HALF=cached.keys.shape[-1] // 2 if kind == ROTARY else launch.cols, KIND=kind, NORM=norm is not None,
        RESIDUAL=residual is not None, FULL=full is not None, DEPTHS=turn.depth is not None, GATED=active is not None,
        SPLITS=launch.splits, ROWS=block, COLS=launch.cols, DEPTH=launch.depth,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


@triton.jit
def _kernel(
    x, weight, gain, epsilon, residual, active, parts, squares, arrived, rows, columns, inner,
    out, cos, sin, length, depths, shift, step, offset, keys, values, key_head, cache_row, value_head,
    full_keys, full_values, full_length, full_key_head, full_value_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, FULL: tl.constexpr, DEPTHS: tl.constexpr,
    GATED: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    row, lane, d = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    is_row = row < rows
    if KIND == 1:
        first, gap, end = tile * COLS, columns // 2, columns // 2
    else:
        first, gap, end = tile // (HALF // COLS) * 2 * HALF + tile % (HALF // COLS) * COLS, HALF, columns
    low, high = first + lane, first + gap + lane
    is_low = low < end
    is_high = is_low if KIND == 1 else high < end
    share = tl.cdiv(tl.cdiv(inner, SPLITS), DEPTH) * DEPTH
    begin = split * share

    low_at = weight + low.to(tl.int64)[:, None] * inner + d[None, :]
    high_at = weight + high.to(tl.int64)[:, None] * inner + d[None, :]
    until = tl.minimum(begin + share, inner)
    if GATED:  # noqa: SIM102 (a constant: the load is not compiled without it)
        if tl.load(active) <= 0:
            return
    if ROWS == 1:  # one row: products lane by lane, summed at the end
        sum_a = tl.zeros([COLS, DEPTH], tl.float32)
        sum_b = tl.zeros([COLS, DEPTH], tl.float32)
        square = tl.zeros([DEPTH], tl.float32)
        for k in range(begin, until, DEPTH):
            is_d = k + d < inner
            part = tl.load(x + k + d, is_d, 0.0).to(tl.float32)
            if NORM:
                square += part * part
                part *= tl.load(gain + k + d, is_d, 0.0).to(tl.float32)
            w = tl.load(low_at + k, is_low[:, None] & is_d[None, :], 0.0)
            sum_a += w.to(tl.float32) * part[None, :]
            w = tl.load(high_at + k, is_high[:, None] & is_d[None, :], 0.0)
            sum_b += w.to(tl.float32) * part[None, :]
        a, b = tl.sum(sum_a, 1)[None, :], tl.sum(sum_b, 1)[None, :]
        total = tl.sum(square, 0) + tl.zeros([ROWS], tl.float32)
    else:
        a = tl.zeros([ROWS, COLS], tl.float32)
        b = tl.zeros([ROWS, COLS], tl.float32)
        x_at = x + row[:, None] * inner + d[None, :]
        for k in range(begin, until, DEPTH):
            is_d = k + d < inner
            part = tl.load(x_at + k, is_row[:, None] & is_d[None, :], 0.0)
            w = tl.load(low_at + k, is_low[:, None] & is_d[None, :], 0.0)
            a = tl.dot(part, tl.trans(w), a, input_precision="ieee")
            w = tl.load(high_at + k, is_high[:, None] & is_d[None, :], 0.0)
            b = tl.dot(part, tl.trans(w), b, input_precision="ieee")
        total = tl.zeros([ROWS], tl.float32)

    last = True
    if SPLITS > 1:
        at = row[:, None] * COLS + lane[None, :]
        place = (tile * SPLITS + split).to(tl.int64)
        tl.store(parts + place * 2 * ROWS * COLS + at, a)
        tl.store(parts + (place * 2 + 1) * ROWS * COLS + at, b)
        if NORM:
            tl.store(squares + place * ROWS + row, total)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(arrived + tile, 0)
            a = tl.zeros([ROWS, COLS], tl.float32)
            b = tl.zeros([ROWS, COLS], tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            for s in range(SPLITS):
                place = (tile * SPLITS + s).to(tl.int64)
                a += tl.load(parts + place * 2 * ROWS * COLS + at, cache_modifier=".cg")
                b += tl.load(parts + (place * 2 + 1) * ROWS * COLS + at, cache_modifier=".cg")
                if NORM:
                    total += tl.load(squares + place * ROWS + row, cache_modifier=".cg")
    if last:
        if NORM:
            scale = tl.rsqrt(total / inner + epsilon)[:, None]
            a, b = a * scale, b * scale
        if KIND == 0:
            at_low = row.to(tl.int64)[:, None] * columns + low[None, :]
            at_high = row.to(tl.int64)[:, None] * columns + high[None, :]
            if RESIDUAL:
                a += tl.load(residual + at_low, is_row[:, None] & is_low[None, :], 0.0).to(tl.float32)
                b += tl.load(residual + at_high, is_row[:, None] & is_high[None, :], 0.0).to(tl.float32)
            tl.store(out + at_low, a.to(out.dtype.element_ty), is_row[:, None] & is_low[None, :])
            tl.store(out + at_high, b.to(out.dtype.element_ty), is_row[:, None] & is_high[None, :])
        elif KIND == 1:
            y = a * tl.sigmoid(a) * b
            at_low = row[:, None] * gap + low[None, :]
            tl.store(out + at_low, y.to(out.dtype.element_ty), is_row[:, None] & is_low[None, :])
        else:
            put_heads(
                a, b, first // (2 * HALF), row, first % (2 * HALF) + lane, is_row, rows, out, cos, sin, length, depths,
                shift, step, offset, keys, values, key_head, cache_row, value_head,
                full_keys, full_values, full_length, full_key_head, full_value_head,
                HEADS, KV_HEADS, FULL, DEPTHS, HALF,
            )  # fmt: skip
