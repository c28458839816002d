"""What stands between the matrix products of a Llama block, one launch each (Triton).

    RMSNorm | q/k/v | rotation, into the cache | attention | o | RMSNorm | gate/up | SiLU | down

With the few rows of a tree the products read their weights at the speed of the memory, and between them the memory
would idle: such a launch takes two microseconds and moves next to nothing. So each can be given a piece of weight that
is needed soon, to be fetched `ahead`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specextend.kernels.ahead import LANES, LINE, programs_for, request

HEADS_PER_PROGRAM = 8
COLUMNS_PER_PROGRAM = 1024


@dataclass(frozen=True)
class Placement:
    """Where T rows stand, and in which rows of a cache their keys and values go.

    Row t is at position `length + shift + depth[t]`, without `depth` at `length + shift + t * step`; its key and value
    go to row `length + offset + t`.

    Args:
        cos, sin: [S, D / 2] tables of the rotary embedding.
        length: [] integer, device; depth: [T] int32, device.
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
    """One layer of a cache, [H_kv, S, D] each, and its length [] integer on the device."""

    keys: Tensor
    values: Tensor
    length: Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, ahead: Tensor | None = None) -> Tensor:
    """RMSNorm of `x` [T, H] as transformers computes it: normed in float32, rounded, then scaled by `weight` [H]."""
    out, first = torch.empty_like(x), programs_for(ahead)
    _norm[(first + len(x),)](
        x, weight, out, x.shape[1], epsilon, x if ahead is None else ahead,
        AHEAD=first, SIZE=triton.next_power_of_2(x.shape[1]), LINE=LINE, LANES=LANES, num_warps=8,
    )  # fmt: skip
    return out


def place(
    qkv: Tensor, where: Placement, cache: KeyValue, *, full: KeyValue | None = None, ahead: Tensor | None = None
) -> Tensor:
    """Rotated queries [H, T, D]; keys, rotated, and values go to `cache`, un-rotated to the end of `full`, too.

    Args:
        qkv: [T, (H + 2 H_kv) D], heads of q before those of k before those of v.
    """
    kv_heads, _, dim = cache.keys.shape
    rows, heads = len(qkv), qkv.shape[1] // dim - 2 * kv_heads
    query, first = qkv.new_empty(heads, rows, dim), programs_for(ahead)
    second = full or cache
    groups = triton.cdiv(heads + 2 * kv_heads, HEADS_PER_PROGRAM)
    _place[(first + rows * groups,)](
        qkv, query, where.cos, where.sin, where.length, qkv if where.depth is None else where.depth,
        where.shift, where.step, where.offset, cache.keys, cache.values, second.keys, second.values, second.length,
        cache.keys.stride(0), second.keys.stride(0), rows, qkv if ahead is None else ahead,
        AHEAD=first, GROUPS=groups, GROUP=HEADS_PER_PROGRAM, HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2,
        DEPTHS=where.depth is not None, FULL=full is not None, LINE=LINE, LANES=LANES, num_warps=4,
    )  # fmt: skip
    return query


def swiglu(gate_up: Tensor, *, ahead: Tensor | None = None) -> Tensor:
    """[T, F]: SiLU(gate) * up of `gate_up` [T, 2 F], rounded as transformers rounds it."""
    rows, size = len(gate_up), gate_up.shape[1] // 2
    out, first = gate_up.new_empty(rows, size), programs_for(ahead)
    parts = triton.cdiv(size, COLUMNS_PER_PROGRAM)
    _swiglu[(first + rows * parts,)](
        gate_up, out, size, parts, gate_up if ahead is None else ahead,
        AHEAD=first, SIZE=COLUMNS_PER_PROGRAM, LINE=LINE, LANES=LANES, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _norm(
    x, weight, out, columns, epsilon, ahead,
    AHEAD: tl.constexpr, SIZE: tl.constexpr, LINE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < AHEAD:
        request(ahead, program, LINE, LANES)
    else:
        column = tl.arange(0, SIZE)
        inside = column < columns
        at = (program - AHEAD) * columns + column
        wide = tl.load(x + at, inside, 0.0).to(tl.float32)
        normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / columns + epsilon)
        gain = tl.load(weight + column, inside, 0.0)
        tl.store(out + at, normed.to(gain.dtype) * gain, inside)


@triton.jit
def _place(
    qkv, query, cos, sin, length, depths, shift, step, offset, keys, values, full_keys, full_values, full_length,
    head_stride, full_stride, rows, ahead,
    AHEAD: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    HALF: tl.constexpr, DEPTHS: tl.constexpr, FULL: tl.constexpr, LINE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < AHEAD:
        request(ahead, program, LINE, LANES)
    else:
        row = (program - AHEAD) // GROUPS
        head = (program - AHEAD) % GROUPS * GROUP + tl.arange(0, GROUP)
        dim = tl.arange(0, HALF)
        at = qkv + row * (HEADS + 2 * KV_HEADS) * 2 * HALF + head[:, None] * 2 * HALF + dim[None, :]
        exists = (head < HEADS + 2 * KV_HEADS)[:, None]
        low, high = tl.load(at, exists, 0.0), tl.load(at + HALF, exists, 0.0)

        known = tl.load(length).to(tl.int32)
        position = known + shift + (tl.load(depths + row).to(tl.int32) if DEPTHS else row * step)
        c = tl.load(cos + position * HALF + dim).to(tl.float32)[None, :]
        s = tl.load(sin + position * HALF + dim).to(tl.float32)[None, :]
        a, b = low.to(tl.float32), high.to(tl.float32)
        turned_low, turned_high = (a * c - b * s).to(low.dtype), (b * c + a * s).to(low.dtype)

        is_query = (head < HEADS)[:, None]
        to = query + (head * rows + row)[:, None] * 2 * HALF + dim[None, :]
        tl.store(to, turned_low, is_query)
        tl.store(to + HALF, turned_high, is_query)
        kv = head.to(tl.int64) - HEADS
        is_key = ((kv >= 0) & (kv < KV_HEADS))[:, None]
        is_value = exists & (kv >= KV_HEADS)[:, None]
        to = (known + offset + row) * 2 * HALF + dim[None, :]
        tl.store(keys + kv[:, None] * head_stride + to, turned_low, is_key)
        tl.store(keys + kv[:, None] * head_stride + to + HALF, turned_high, is_key)
        tl.store(values + (kv - KV_HEADS)[:, None] * head_stride + to, low, is_value)
        tl.store(values + (kv - KV_HEADS)[:, None] * head_stride + to + HALF, high, is_value)
        if FULL:
            to = (tl.load(full_length).to(tl.int32) + row) * 2 * HALF + dim[None, :]
            tl.store(full_keys + kv[:, None] * full_stride + to, low, is_key)
            tl.store(full_keys + kv[:, None] * full_stride + to + HALF, high, is_key)
            tl.store(full_values + (kv - KV_HEADS)[:, None] * full_stride + to, low, is_value)
            tl.store(full_values + (kv - KV_HEADS)[:, None] * full_stride + to + HALF, high, is_value)


@triton.jit
def _swiglu(
    gate_up, out, size, parts, ahead,
    AHEAD: tl.constexpr, SIZE: tl.constexpr, LINE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < AHEAD:
        request(ahead, program, LINE, LANES)
    else:
        row, part = (program - AHEAD) // parts, (program - AHEAD) % parts
        column = part * SIZE + tl.arange(0, SIZE)
        inside = column < size
        gate = tl.load(gate_up + row * 2 * size + column, inside, 0.0)
        up = tl.load(gate_up + row * 2 * size + size + column, inside, 0.0)
        wide = gate.to(tl.float32)
        tl.store(out + row * size + column, (wide * tl.sigmoid(wide)).to(gate.dtype) * up, inside)
