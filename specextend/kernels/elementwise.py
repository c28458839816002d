"""What stands between the products of a Llama block (Triton): RMSNorm, rotation into the cache, SiLU gate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 16  # of a program that places or gates
COLUMNS = 1024  # of a program that gates


@dataclass(frozen=True)
class Placement:
    """Where queries, keys and values go, and by which angles they turn.

    Query t stands at position `length + shift + depth[t]`, without `depth` at `length + shift + t * step`; its key and
    value go to row `length + offset + t` of the cache.

    Args:
        cos, sin: [S, D] as `Rope.tables` has them.
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
    """One layer of a cache: [H_kv, S, D] each, and its length [] int, device."""

    keys: Tensor
    values: Tensor
    length: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """RMSNorm by `weight` [H]."""

    weight: Tensor
    epsilon: float


def rms_norm(x: Tensor, norm: Norm, active: Tensor | None = None) -> Tensor:
    """RMSNorm of `x` [T, H] as transformers computes it: normed in float32, rounded, then scaled.

    Args:
        active: [>= 1] float32, device; where its first is not positive, the launch ends at once.
    """
    out = torch.empty_like(x)
    _norm[(len(x),)](
        x, norm.weight, out, active if active is not None else x, x.shape[1], norm.epsilon, GATED=active is not None,
        SIZE=triton.next_power_of_2(x.shape[1]), num_warps=8,
    )  # fmt: skip
    return out


def place(states: Tensor, where: Placement, cache: KeyValue) -> Tensor:
    """Rotated queries [H, T, D] of projected `states` [T, (H + 2 H_kv) D]; keys, rotated, and values go to `cache`."""
    rows, columns = states.shape
    kv_heads, _, dim = cache.keys.shape
    out = states.new_empty(columns // dim - 2 * kv_heads, rows, dim)
    _turn[(columns // dim, triton.cdiv(rows, ROWS))](
        states, rows, columns, *placed(out, where, cache, None), HEADS=len(out), KV_HEADS=kv_heads, FULL=False,
        DEPTHS=where.depth is not None, ROWS=ROWS, HALF=dim // 2, num_warps=4,
    )  # fmt: skip
    return out


def placed(out: Tensor, where: Placement, cache: KeyValue, full: KeyValue | None) -> tuple:
    """The arguments of `put_heads` from `out` on."""
    second = full or KeyValue(cache.keys, cache.values, where.length)
    return (
        out, where.cos, where.sin, where.length, where.depth if where.depth is not None else out, where.shift,
        where.step, where.offset, cache.keys, cache.values, cache.keys.stride(0), cache.keys.stride(-2),
        cache.values.stride(0), second.keys, second.values, second.length, second.keys.stride(0),
        second.values.stride(0),
    )  # fmt: skip


def gate(x: Tensor) -> Tensor:
    """[T, F]: SiLU of the first half of the columns of `x` [T, 2 F] times the second."""
    rows, inner = len(x), x.shape[1] // 2
    out = x.new_empty(rows, inner)
    _gate[(rows, triton.cdiv(inner, COLUMNS))](
        x, out, inner, COLUMNS=COLUMNS, num_warps=4
    )  # fmt: skip
    return out


@triton.jit
def _norm(
    x, weight, out, active, columns, epsilon, GATED: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    if GATED:  # noqa: SIM102 (a constant: the load is not compiled without it)
        if tl.load(active) <= 0:
            return
    column = tl.arange(0, SIZE)
    inside = column < columns
    at = tl.program_id(0).to(tl.int64) * columns + column
    wide = tl.load(x + at, inside, 0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / columns + epsilon)
    gain = tl.load(weight + column, inside, 0.0)
    tl.store(out + at, normed.to(gain.dtype) * gain, inside)


@triton.jit
def _gate(x, out, inner, COLUMNS: tl.constexpr):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < inner
    row = tl.program_id(0).to(tl.int64)
    a = tl.load(x + row * 2 * inner + column, inside, 0.0).to(tl.float32)
    b = tl.load(x + row * 2 * inner + inner + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * inner + column, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), inside)


@triton.jit
def _turn(
    states, rows, columns, out, cos, sin, length, depths, shift, step, offset,
    keys, values, key_head, cache_row, value_head, full_keys, full_values, full_length, full_key_head, full_value_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, FULL: tl.constexpr, DEPTHS: tl.constexpr, ROWS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, HALF)
    is_row = row < rows
    at = states + row.to(tl.int64)[:, None] * columns + head * 2 * HALF + col[None, :]
    a = tl.load(at, is_row[:, None], 0.0).to(tl.float32)
    b = tl.load(at + HALF, is_row[:, None], 0.0).to(tl.float32)
    put_heads(
        a, b, head, row, col, is_row, rows, out, cos, sin, length, depths, shift, step, offset,
        keys, values, key_head, cache_row, value_head,
        full_keys, full_values, full_length, full_key_head, full_value_head, HEADS, KV_HEADS, FULL, DEPTHS, HALF,
    )  # fmt: skip


@triton.jit
def put_heads(
    a, b, head, row, col, is_row, rows, out, cos, sin, length, depths, shift, step, offset,
    keys, values, key_head, cache_row, value_head, full_keys, full_values, full_length, full_key_head, full_value_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, FULL: tl.constexpr, DEPTHS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate a head whose halves are `a` and `b` [T, D / 2], unless it is a value; put it where it belongs."""
    known = tl.load(length).to(tl.int32)
    at = row[:, None] * cache_row + col[None, :]
    here = (known + offset).to(tl.int64) * cache_row + at
    mask = is_row[:, None]
    if FULL:
        there = tl.load(full_length).to(tl.int64) * cache_row + at
    if head < HEADS + KV_HEADS:
        if DEPTHS:
            position = known + shift + tl.load(depths + row, is_row, 0).to(tl.int32)
        else:
            position = known + shift + row * step
        angle = position.to(tl.int64)[:, None] * 2 * HALF + col[None, :]
        c = tl.load(cos + angle, mask, 0.0).to(tl.float32)
        s = tl.load(sin + angle + HALF, mask, 0.0).to(tl.float32)  # of the second half, whose sign is plus
        a = a.to(out.dtype.element_ty).to(tl.float32)  # as rounded as the projection's output
        b = b.to(out.dtype.element_ty).to(tl.float32)
        low, high = a * c - b * s, b * c + a * s
        if head < HEADS:
            put(out + (head * rows + row).to(tl.int64)[:, None] * 2 * HALF + col[None, :], low, high, mask, HALF)
        else:
            kv = (head - HEADS).to(tl.int64)
            put(keys + kv * key_head + here, low, high, mask, HALF)
            if FULL:
                put(full_keys + kv * full_key_head + there, a, b, mask, HALF)
    else:
        kv = (head - HEADS - KV_HEADS).to(tl.int64)
        put(values + kv * value_head + here, a, b, mask, HALF)
        if FULL:
            put(full_values + kv * full_value_head + there, a, b, mask, HALF)


@triton.jit
def put(to, low, high, mask, HALF: tl.constexpr):
    """Store the halves of heads at `to` [T, D / 2]."""
    tl.store(to, low.to(to.dtype.element_ty), mask)
    tl.store(to + HALF, high.to(to.dtype.element_ty), mask)
