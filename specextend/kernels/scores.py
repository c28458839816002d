"""The attention of one query over all cached keys, mean over heads, in one pass over the keys (Triton).

What "Cross-model Retrieval" asks of the target. The definition is `attention.attention_row`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 32  # per program


def attention_row(query: Tensor, lse: Tensor, newest: Tensor, keys: Tensor, length: Tensor, scaling: float) -> Tensor:
    """[S] float32 attention over the first `length` keys, 0 beyond.

    Args:
        query: [H, T, D] of the last layer; lse: [H, T] their log-sum-exp.
        newest: [] integer, device: which of the T.
        keys: [H_kv, S, D]; length: [] integer, device.
    """
    kv_heads, size, dim = keys.shape
    row = torch.empty(size, dtype=torch.float32, device=keys.device)
    _row[(triton.cdiv(size, KEYS),)](
        query, lse, newest, keys, length, row, scaling, size,
        query.stride(0), query.stride(1), lse.stride(0), keys.stride(0), keys.stride(1),
        HEADS=query.shape[0], KV_HEADS=kv_heads, DIM=dim, KEYS=KEYS, num_warps=4,
    )  # fmt: skip
    return row


@triton.jit
def _row(
    query, lse, newest, keys, length, row, scale, size, query_head, query_row, lse_head, key_head, key_row,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    dim = tl.arange(0, DIM)
    is_key = position < tl.load(length)
    chosen = tl.load(newest)
    total = tl.zeros([KEYS], tl.float32)
    for kv in tl.range(KV_HEADS, num_stages=4):
        k = tl.load(keys + kv * key_head + position[:, None] * key_row + dim[None, :], is_key[:, None], 0.0)
        for group in range(HEADS // KV_HEADS):
            head = kv * (HEADS // KV_HEADS) + group
            q = tl.load(query + head * query_head + chosen * query_row + dim).to(tl.float32)
            score = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
            total += tl.exp(score - tl.load(lse + head * lse_head + chosen))
    tl.store(row + position, tl.where(is_key, total / HEADS, 0.0), position < size)
