"""Hybrid Tree Attention in one pass over the KV cache (Triton), with the log-sum-exp of its scores.

T queries see the whole prefix and, of the slots behind it, their own ancestors:

           prefix 0 .. N-1          slots N .. N+K-1
    query  1 1 1 1 1 1 ... 1 1 1    bit (query, slot) of the mask

Prefix and slots are split over programs, each of which reads its keys and values once for all queries of a KV head: the
query heads that share it are stacked into the rows of one tile. A small second kernel merges the splits. N is read from
device memory, so that one captured launch serves every length.

The definition, and the oracle of the tests, is `attention.HybridAttention(fused=False)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
WORD = 32  # mask bits per word


@dataclass(frozen=True)
class Launch:
    """How the first kernel is launched.

    Args:
        splits: programs that share the keys of a KV head.
        keys: keys per tile.
        warps, stages: of a program.
    """

    splits: int
    keys: int = 64
    warps: int = 4
    stages: int = 3


def launch_for(device: torch.device, kv_heads: int, rows: int) -> Launch:
    """A launch that fills the multiprocessors: `rows` stacked queries for each of `kv_heads`; small tiles twice."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    programs *= 2 if rows <= 16 else 1
    splits = max(1, min(32, programs // (kv_heads * triton.cdiv(rows, 128))))
    return Launch(splits, warps=8 if rows > 64 else 4)


class Workspace:
    """Partial results, allocated once for the largest launch; a captured graph keeps pointing at them."""

    def __init__(self, heads: int, queries: int, dim: int, splits: int, device: torch.device):
        self.output = torch.empty(splits, heads, queries, dim, dtype=torch.float32, device=device)
        self.lse = torch.empty(splits, heads, queries, dtype=torch.float32, device=device)


def pack_mask(mask: Tensor) -> Tensor:
    """Bits of `mask` [T, K] bool as words [T, ceil(K / 32)] int32, slot j in bit j % 32 of word j // 32."""
    words = -(-mask.shape[1] // WORD)
    bits = torch.nn.functional.pad(mask, (0, words * WORD - mask.shape[1])).view(mask.shape[0], words, WORD)
    weights = torch.ones(WORD, dtype=torch.int64, device=mask.device) << torch.arange(WORD, device=mask.device)
    return (bits * weights).sum(-1).to(torch.int32)  # bit 31 wraps to the sign, as it should


def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    mask: Tensor,
    scaling: float,
    *,
    slots: int,
    launch: Launch,
    workspace: Workspace | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of tree nodes over a static cache.

    Args:
        query: [H, T, D], float16, bfloat16 or float32; D a power of two of at least 16.
        keys, values: [H_kv, S, D], the whole buffers, D contiguous; the slots stand behind the prefix.
        length: [] or [1] integer on the device, the prefix's N.
        mask: [T, ceil(slots / 32)] int32 as `pack_mask` makes it; every query sees some prefix or slot.
        scaling: factor on the scores.
        slots: K, number of slots behind the prefix.
        active: [>= 1] float32, device; where its first is not positive, the launches end at once and compute nothing.
    Returns:
        output [H, T, D] in the query's dtype, in memory [T, H, D] as the output projection reads it, and lse [H, T]
        float32 (natural logarithm).
    """
    heads, queries, dim = query.shape
    kv_heads = keys.shape[0]
    groups = heads // kv_heads
    rows = min(128, max(16, triton.next_power_of_2(groups * queries)))
    workspace = workspace or Workspace(heads, queries, dim, launch.splits, query.device)
    output = query.new_empty(queries, heads, dim)
    lse = torch.empty(heads, queries, dtype=torch.float32, device=query.device)
    gated, gate = active is not None, active if active is not None else lse
    _split[(launch.splits, kv_heads, triton.cdiv(groups * queries, rows))](
        query, keys, values, length, mask, gate, workspace.output, workspace.lse,
        scaling * LOG2E, queries, slots, heads,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        mask.stride(0),
        GATED=gated, GROUPS=groups, SPLITS=launch.splits, ROWS=rows, KEYS=launch.keys, DIM=dim,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    _merge[(heads * queries,)](
        workspace.output, workspace.lse, output, lse, gate, heads, queries, GATED=gated,
        SPLITS=launch.splits, PADDED=triton.next_power_of_2(launch.splits), DIM=dim, num_warps=1,
    )  # fmt: skip
    return output.transpose(0, 1), lse


@triton.jit
def _split(
    query, keys, values, length, mask, active, partial, partial_lse,
    scale, queries, slots, heads,
    query_head, query_row, key_head, key_row, value_head, value_row, mask_row,
    GATED: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """One split of prefix and slots for one tile of the stacked queries of a KV head."""
    split, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)  # row g * T + t is query t of the g-th head of the group
    is_row = row < GROUPS * queries
    head, node = kv_head * GROUPS + row // queries, row % queries
    dim, offset = tl.arange(0, DIM), tl.arange(0, KEYS)
    keys += kv_head.to(tl.int64) * key_head
    values += kv_head.to(tl.int64) * value_head
    if GATED:  # noqa: SIM102 (a constant: the load is not compiled without it)
        if tl.load(active) <= 0:
            return
    q = tl.load(query + head[:, None] * query_head + node[:, None] * query_row + dim[None, :], is_row[:, None], 0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, DIM], tl.float32)

    prefix = tl.load(length).to(tl.int32)
    share = tl.cdiv(tl.cdiv(prefix + slots, SPLITS), KEYS) * KEYS
    begin, end = split * share, tl.minimum(split * share + share, prefix + slots)
    whole = tl.maximum(begin, tl.minimum(end, prefix) // KEYS * KEYS)  # tiles before it lie in the prefix
    for start in range(begin, whole, KEYS):
        at = start + offset
        k = tl.load(keys + at[:, None] * key_row + dim[None, :])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        v = tl.load(values + at[:, None] * value_row + dim[None, :])
        best, total, output = _absorb(scores, v, scale, best, total, output)
    for start in range(whole, end, KEYS):
        at = start + offset
        slot = at - prefix
        is_slot = (slot >= 0) & (slot < slots)
        word = tl.load(mask + node[:, None] * mask_row + (slot // 32)[None, :], is_row[:, None] & is_slot[None, :], 0)
        visible = (slot < 0)[None, :] | (((word >> (slot % 32)[None, :]) & 1) == 1)
        k = tl.load(keys + at[:, None] * key_row + dim[None, :], (slot < slots)[:, None], 0.0)
        scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
        v = tl.load(values + at[:, None] * value_row + dim[None, :], (slot < slots)[:, None], 0.0)
        best, total, output = _absorb(scores, v, scale, best, total, output)

    place = split * heads * queries + head * queries + node
    seen = total > 0
    output = output / tl.where(seen, total, 1.0)[:, None]
    tl.store(partial + place[:, None] * DIM + dim[None, :], output, is_row[:, None])
    tl.store(partial_lse + place, tl.where(seen, best + tl.log2(tl.where(seen, total, 1.0)), float("-inf")), is_row)


@triton.jit
def _absorb(scores, v, scale, best, total, output):
    """Add keys of unscaled `scores` and values `v` to a softmax in progress; -inf is a key not seen."""
    highest = tl.maximum(best, tl.max(scores, 1) * scale)
    pivot = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen so far: all weights are 0
    weights = tl.exp2(scores * scale - pivot[:, None])
    decay = tl.exp2(best - pivot)
    output = tl.dot(weights.to(v.dtype), v, output * decay[:, None], input_precision="ieee")
    return highest, total * decay + tl.sum(weights, 1), output


@triton.jit
def _merge(
    partial, partial_lse, output, lse, active, heads, queries,
    GATED: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """One softmax out of the splits' for one query of one head."""
    if GATED:  # noqa: SIM102 (a constant: the load is not compiled without it)
        if tl.load(active) <= 0:
            return
    row, rows = tl.program_id(0), heads * queries
    split, dim = tl.arange(0, PADDED), tl.arange(0, DIM)
    is_split = split < SPLITS
    part = tl.load(partial_lse + split * rows + row, is_split, float("-inf"))
    highest = tl.max(part, 0)
    weights = tl.exp2(part - highest)
    total = tl.sum(weights, 0)
    parts = tl.load(partial + (split * rows + row)[:, None] * DIM + dim[None, :], is_split[:, None], 0.0)
    merged = tl.sum(parts * weights[:, None], 0) / total
    place = (row % queries) * heads + row // queries
    tl.store(output + place * DIM + dim, merged.to(output.dtype.element_ty))
    tl.store(lse + row, (highest + tl.log2(total)) / 1.4426950408889634)
