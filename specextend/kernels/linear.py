"""Products of a few rows with large weights, with what stands around them in a Llama block fused in (Triton).

A block over T <= 128 tree slots reads each weight once and does little else, so its time is the weights' bytes plus
what every launch costs. Beside its attention a block is

    RMSNorm | q/k/v, rotation, into the cache      o, residual | RMSNorm | gate/up, SiLU | down, residual

A tile is 2 * COLS output columns, two runs of COLS: the halves of a head that a rotation mixes, or gate and up. A
single row is multiplied without the matrix unit and normed on the way: `W (x g / rms(x)) = (W (x g)) / rms(x)`, and
every program sees the row whole. Where there are fewer tiles than multiprocessors, the inner dimension is split; the
last program to arrive at a tile adds the parts up, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN, SWIGLU, ROTARY = 0, 1, 2
PROGRAMS = 96  # enough to draw the memory's bandwidth


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


@dataclass(frozen=True)
class Norm:
    """RMSNorm of the input: `weight` [K]."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class Placement:
    """Where queries, keys and values go, and by which angles they turn.

    Query t stands at position `length + shift + depth[t]`, without `depth` at `length + shift + t * step`; its key and
    value go to row `length + offset + t` of the cache.

    Args:
        cos, sin: [S, D / 2] tables.
        length: [] int, device.
        depth: [T] int, device.
    """

    cos: Tensor
    sin: Tensor
    length: Tensor
    shift: int = 0
    step: int = 1
    offset: int = 0
    depth: Tensor | None = None


@dataclass(frozen=True)
class KeyValue:
    """One layer of a cache: [H_kv, S, D] each, and for a second, un-rotated copy its own length [] int, device."""

    keys: Tensor
    values: Tensor
    length: Tensor | None = None


def linear(
    x: Tensor, weight: Tensor, workspace: Workspace, *, residual: Tensor | None = None, launch: Launch | None = None
) -> Tensor:
    """[T, N]: `x` [T, K] times `weight` [N, K] transposed, plus `residual` [T, N]."""
    out = x.new_empty(len(x), len(weight))
    launch = launch or _launch(x, cols=32, depth=128, splits=2, stages=6)
    _run(PLAIN, x, weight, workspace, launch, triton.cdiv(len(weight), 2 * launch.cols), None, out, residual=residual)
    return out


def swiglu(
    x: Tensor, weight: Tensor, workspace: Workspace, *, norm: Norm | None = None, launch: Launch | None = None
) -> Tensor:
    """[T, F]: SiLU(gate) * up of `x` [T, K], normed if asked; `weight` [2 F, K] holds gate over up."""
    x, norm = _normed(x, norm)
    out = x.new_empty(len(x), len(weight) // 2)
    if launch is None:
        launch = Launch(8, 1024, stages=3) if len(x) == 1 else _launch(x, cols=32, depth=64, stages=4)
    _run(SWIGLU, x, weight, workspace, launch, triton.cdiv(out.shape[1], launch.cols), norm, out)
    return out


def rotary(
    x: Tensor, weight: Tensor, workspace: Workspace, where: Placement, cache: KeyValue, *,
    norm: Norm | None = None, full: KeyValue | None = None, launch: Launch | None = None,
) -> Tensor:  # fmt: skip
    """Rotated queries [H, T, D] of `x` [T, K]; keys, rotated, and values go to `cache`, un-rotated to `full`, too.

    Args:
        weight: [(H + 2 H_kv) D, K], heads of q over those of k over those of v.
    """
    x, norm = _normed(x, norm)
    kv_heads, _, dim = cache.keys.shape
    tiles = len(weight) // dim
    out = x.new_empty(tiles - 2 * kv_heads, len(x), dim)
    if launch is None:
        splits = min(8, max(1, PROGRAMS // tiles))
        launch = _launch(x, cols=dim // 2, depth=128, splits=max(2, splits) if len(x) == 1 else splits, stages=4)
    assert launch.cols == dim // 2, "a tile is a head"
    _run(ROTARY, x, weight, workspace, launch, tiles, norm, out, where=where, cache=cache, full=full)
    return out


def _normed(x: Tensor, norm: Norm | None) -> tuple[Tensor, Norm | None]:
    """Several rows are normed in a launch of their own: beside the matrix unit's work it would take longer."""
    return (x, norm) if norm is None or len(x) == 1 else (rms_norm(x, norm.weight, norm.epsilon), None)


def _launch(x: Tensor, *, cols: int, depth: int, stages: int, splits: int = 1) -> Launch:
    """Tuned for 64 rows of half precision on an H200; `depth` shrinks where tiles would outgrow the shared memory."""
    depth = depth * 2 // x.itemsize // (2 if len(x) > 64 else 1)
    return Launch(cols, depth, splits, stages=stages)


def _run(
    kind: int, x: Tensor, weight: Tensor, workspace: Workspace, launch: Launch, tiles: int, norm: Norm | None,
    out: Tensor, *, residual: Tensor | None = None, where: Placement | None = None, cache: KeyValue | None = None,
    full: KeyValue | None = None,
) -> None:  # fmt: skip
    rows, inner = x.shape
    block = 1 if rows == 1 else min(128, max(16, triton.next_power_of_2(rows)))
    assert rows <= 128 and weight.is_contiguous() and x.is_contiguous()
    assert tiles * launch.splits * block * 2 * launch.cols <= workspace.parts.numel() or launch.splits == 1
    turn = where or Placement(x, x, x)
    cached = cache or KeyValue(out, out)
    second = full or KeyValue(cached.keys, cached.values, turn.length)
    _kernel[(tiles, launch.splits)](
        x, weight, norm.weight if norm else x, norm.epsilon if norm else 0.0, out,
        residual if residual is not None else x, workspace.parts, workspace.squares, workspace.arrived,
        rows, len(weight), inner,
        turn.cos, turn.sin, turn.length, turn.depth if turn.depth is not None else x, turn.shift, turn.step,
        turn.offset, cached.keys, cached.values, cached.keys.stride(0), cached.keys.stride(-2), cached.values.stride(0),
        second.keys, second.values, second.length, second.keys.stride(0), second.values.stride(0),
        HEADS=out.shape[0] if kind == ROTARY else 1, KV_HEADS=cached.keys.shape[0] if kind == ROTARY else 1,
        KIND=kind, NORM=norm is not None, RESIDUAL=residual is not None, FULL=full is not None,
        DEPTHS=turn.depth is not None, SPLITS=launch.splits, ROWS=block, COLS=launch.cols, DEPTH=launch.depth,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of `x` [T, H] as transformers computes it: normed in float32, rounded, then scaled by `weight` [H]."""
    out = torch.empty_like(x)
    _norm[(len(x),)](x, weight, out, x.shape[1], epsilon, SIZE=triton.next_power_of_2(x.shape[1]), num_warps=8)
    return out


@triton.jit
def _kernel(
    x, weight, gain, epsilon, out, residual, parts, squares, arrived, rows, columns, inner,
    cos, sin, length, depths, shift, step, offset, keys, values, key_head, cache_row, value_head,
    full_keys, full_values, full_length, full_key_head, full_value_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, FULL: tl.constexpr, DEPTHS: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    row, col, d = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    is_row = row < rows
    if KIND == 1:
        first, gap, end = tile * COLS, columns // 2, columns // 2
    else:
        first, gap, end = tile * 2 * COLS, COLS, columns
    low, high = first + col, first + gap + col
    is_low = low < end
    is_high = is_low if KIND == 1 else high < end
    share = tl.cdiv(tl.cdiv(inner, SPLITS), DEPTH) * DEPTH
    begin = split * share

    low_at = weight + low.to(tl.int64)[:, None] * inner + d[None, :]
    high_at = weight + high.to(tl.int64)[:, None] * inner + d[None, :]
    until = tl.minimum(begin + share, inner)
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
        at = row[:, None] * COLS + col[None, :]
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
            _place(
                a, b, tile, row, col, is_row, rows, out, cos, sin, length, depths, shift, step, offset,
                keys, values, key_head, cache_row, value_head,
                full_keys, full_values, full_length, full_key_head, full_value_head,
                HEADS, KV_HEADS, FULL, DEPTHS, COLS,
            )  # fmt: skip


@triton.jit
def _place(
    a, b, head, row, col, is_row, rows, out, cos, sin, length, depths, shift, step, offset,
    keys, values, key_head, cache_row, value_head, full_keys, full_values, full_length, full_key_head, full_value_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, FULL: tl.constexpr, DEPTHS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate a head whose halves are `a` and `b` [T, D / 2], unless it is a value; put it where it belongs."""
    known = tl.load(length).to(tl.int32)
    at = row[:, None] * cache_row + col[None, :]
    mask = is_row[:, None]
    dtype = out.dtype.element_ty
    if head < HEADS + KV_HEADS:
        if DEPTHS:
            position = known + shift + tl.load(depths + row, is_row, 0).to(tl.int32)
        else:
            position = known + shift + row * step
        angle = position[:, None] * HALF + col[None, :]
        c = tl.load(cos + angle, mask, 0.0).to(tl.float32)
        s = tl.load(sin + angle, mask, 0.0).to(tl.float32)
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)  # as rounded as the projection's output
        low, high = a * c - b * s, b * c + a * s
        if head < HEADS:
            to = out + (head * rows + row)[:, None] * 2 * HALF + col[None, :]
            tl.store(to, low.to(dtype), mask)
            tl.store(to + HALF, high.to(dtype), mask)
        else:
            kv = (head - HEADS).to(tl.int64)
            to = keys + kv * key_head + (known + offset) * cache_row + at
            tl.store(to, low.to(dtype), mask)
            tl.store(to + HALF, high.to(dtype), mask)
            if FULL:
                to = full_keys + kv * full_key_head + tl.load(full_length) * cache_row + at
                tl.store(to, a.to(dtype), mask)
                tl.store(to + HALF, b.to(dtype), mask)
    else:
        kv = (head - HEADS - KV_HEADS).to(tl.int64)
        to = values + kv * value_head + (known + offset) * cache_row + at
        tl.store(to, a.to(dtype), mask)
        tl.store(to + HALF, b.to(dtype), mask)
        if FULL:
            to = full_values + kv * full_value_head + tl.load(full_length) * cache_row + at
            tl.store(to, a.to(dtype), mask)
            tl.store(to + HALF, b.to(dtype), mask)


@triton.jit
def _norm(
    x, weight, out, columns, epsilon, SIZE: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, SIZE)
    inside = column < columns
    at = tl.program_id(0) * columns + column
    wide = tl.load(x + at, inside, 0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / columns + epsilon)
    gain = tl.load(weight + column, inside, 0.0)
    tl.store(out + at, normed.to(gain.dtype) * gain, inside)
