"""The attention of every model here, target and draft ("Hybrid Tree Attention"; FlashAttention prefill).

transformers calls `registered_attention` in every layer; the caller of the model passes an `attend` object that owns
the KV cache and says who sees whom. Nothing is looked up in globals, and no modelling file is forked.

An `Attention` answers one question: T queries against N + K keys, of which the first N (the prefix) are visible to
every query and the last K (the tail: a prefill block, a draft tree) under a mask. `DenseAttention` materialises all
scores, as the paper's baseline does; `HybridAttention` runs the two parts apart and merges them by log-sum-exp.
"""

from __future__ import annotations

import importlib.util
from typing import Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "specextend"
SCORES_AT_ONCE, SCORES_AT_ONCE_ON_GPU = 1 << 24, 1 << 28  # elements; a prefill's of one head may be more
OWN_KERNEL_QUERIES = 128  # from so many on the newest tokens are read by our own kernel
ONE_PASS_QUERIES = 128  # on a CPU; the mask of a prefill block would be as large as its scores


class Attend(Protocol):
    """What a model run is given as `attend`: one call per layer, keys and values already of this layer."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention output [B, H, T, D] for `query` [B, H, T, D], `key` and `value` [B, H_kv, T, D]."""


def registered_attention(module, query, key, value, attention_mask, *, scaling, attend: Attend, **_) -> tuple:
    """The function transformers knows as "specextend"; it hands over to `attend` and restores [B, T, H, D]."""
    return attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, registered_attention)


class Attention(Protocol):
    """How T queries attend to a prefix they all see and to a masked tail."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, tail: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attend; exact softmax attention, whatever the route.

        Args:
            query: [B, H, T, D].
            key, value: [B, H_kv, N + tail, D], keys rotated; H is a multiple of H_kv (grouped-query attention).
            scaling: factor on the scores.
            tail: number of last keys that `mask` governs.
            mask: [T, tail] bool, true where visible; None is the causal mask of a block (then tail = T).
        Returns:
            output [B, H, T, D] in the query's dtype and the scores' log-sum-exp [B, H, T] in float32 or wider.
        """


def attention(*, hybrid: bool) -> Attention:
    """The attention behind a switch: `HybridAttention`, or the baseline's."""
    return HybridAttention() if hybrid else DenseAttention()


class DenseAttention:
    """All scores, [H, T, N + tail]: the definition, and the paper's baseline. As many KV heads at once as are small."""

    def __call__(self, query, key, value, scaling, tail, mask):
        queries = _stack_groups(query, key.shape[1])
        groups = queries.shape[2] // query.shape[2]
        hidden = _full_mask(query.shape[2], key.shape[2], tail, mask, query.device).logical_not().repeat(groups, 1)
        at_once = SCORES_AT_ONCE_ON_GPU if query.is_cuda else SCORES_AT_ONCE
        heads = max(1, at_once // (queries.shape[2] * key.shape[2]))
        parts = zip(*(states.split(heads, dim=1) for states in (queries, key, value)), strict=True)
        outputs = [_dense_attention(*part, scaling, hidden) for part in parts]
        output, lse = (torch.cat(part, dim=1) for part in zip(*outputs, strict=True))
        return _unstack_groups(output, lse, query)


class HybridAttention:
    """Prefix without a mask plus tail under the mask, merged by log-sum-exp; reads every key and value once.

    Args:
        fused: False runs both parts in plain PyTorch, the reference. On a CPU the fused op takes a mask as well, and
            for a few queries one masked pass costs less than two parts and their merge.
    """

    def __init__(self, fused: bool = True):
        self._fused = fused
        self._unmasked = flash_attention if fused else masked_attention

    def __call__(self, query, key, value, scaling, tail, mask):
        if tail == 1 and query.shape[2] == 1:  # a token always sees itself: one part is enough
            tail = 0
        if tail and self._fused and query.device.type == "cpu" and query.shape[2] <= ONE_PASS_QUERIES:
            return masked_flash_attention(query, key, value, scaling, tail, mask)
        if mask is None and tail == query.shape[2] and self._fused and has_flash_kernel(query.device, query.dtype):
            return newest_attention(query, key, value, scaling)
        prefix = key.shape[2] - tail
        queries = _stack_groups(query, key.shape[1])
        parts = []
        if prefix:
            parts.append(self._unmasked(queries, key[:, :, :prefix], value[:, :, :prefix], scaling))
        if tail:
            parts.append(self._tail(query, queries, key[:, :, prefix:], value[:, :, prefix:], scaling, mask))
        output, lse = parts[0] if len(parts) == 1 else merge(*parts)
        return _unstack_groups(output, lse, query)

    def _tail(self, query, queries, key, value, scaling, mask):
        if mask is None and self._unmasked is flash_attention:
            return causal_flash_attention(query, key, value, scaling)
        if mask is None:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        return masked_attention(queries, key, value, scaling, mask.repeat(queries.shape[2] // query.shape[2], 1))


def merge(prefix: tuple[Tensor, Tensor], tail: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax out of two over disjoint keys: `w = sigmoid(lse_prefix - lse_tail)` weighs the prefix.

    Args:
        prefix, tail: (output [B, H, T, D], lse [B, H, T]) each.
    """
    (output_prefix, lse_prefix), (output_tail, lse_tail) = prefix, tail
    weight = torch.sigmoid(lse_prefix - lse_tail)[..., None]
    output = torch.lerp(output_tail.to(weight.dtype), output_prefix.to(weight.dtype), weight)
    return output.to(output_prefix.dtype), torch.logaddexp(lse_prefix, lse_tail)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch softmax attention with as many key as query heads; softmax in float32 or wider.

    Args:
        query: [B, H, T, D]; key, value: [B, H, K, D]; mask: [T, K] bool, each row with a true entry.
    """
    return _dense_attention(query, key, value, scaling, None if mask is None else ~mask)


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`masked_attention`; as many passes over the scores as transformers' eager attention, and one for the lse."""
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    lse = scores.amax(-1).to(weights.dtype) - weights.amax(-1).log()
    return torch.matmul(weights.to(value.dtype), value), lse


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention that also returns the log-sum-exp; no score matrix is ever formed.

    Args:
        query: [B, H, T, D]; key, value: [B, H, K, D].
        mask: [T, K] additive, in the query's dtype (CPU only).
    """
    if query.device.type == "cuda" and query.dtype == torch.float32:  # FlashAttention knows half precision only
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scaling
        )
        return output, lse[:, :, : query.shape[2]]
    if query.device.type == "cuda":
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scaling
        )
        return output, lse[:, :, : query.shape[2]]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scaling
    )


def has_flash_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `newest_attention` runs: FlashAttention proper, which knows half precision only."""
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def newest_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The newest T of K tokens, each seeing the keys up to its own, at most `window` of them, in one launch.

    Args:
        query: [B, H, T, D]; key, value: [B, H_kv, K, D]; where `has_flash_kernel`.
    """
    if window is None and query.shape[2] >= OWN_KERNEL_QUERIES and importlib.util.find_spec("triton"):
        from specextend.kernels.prefill_attention import is_supported, prefill_attention

        if is_supported(query):
            return prefill_attention(query, key, value, scaling)
    states = (part.transpose(1, 2) for part in (query, key, value))
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        *states, None, None, query.shape[2], key.shape[2], 0.0, True, False, scale=scaling,
        window_size_left=None if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return output.transpose(1, 2), lse[:, :, : query.shape[2]]


def masked_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, tail: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`HybridAttention` in one pass of the CPU's fused op, its mask written out as [G * T, N + tail] summands."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(queries, tail, dtype=torch.bool).tril(tail - queries)
    bias = torch.zeros(queries, keys, dtype=query.dtype)
    bias[:, keys - tail :].masked_fill_(~mask, float("-inf"))
    stacked = _stack_groups(query, key.shape[1])
    bias = bias.repeat(stacked.shape[2] // queries, 1)
    return _unstack_groups(*flash_attention(stacked, key, value, scaling, mask=bias), query)


def causal_flash_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Causal fused attention of a block with itself, [B, H, T, D] against [B, H_kv, T, D], KV heads not expanded.

    Returns the rows stacked by group, as `_stack_groups` lays them out.
    """
    kv_heads = key.shape[1]
    groups = query.shape[1] // kv_heads
    parts = [flash_attention(query[:, g::groups], key, value, scaling, causal=True) for g in range(groups)]
    output, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return output, lse


def band_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> tuple[Tensor, Tensor]:
    """Sliding causal window: the newest T of K keys' queries see the last `window` keys up to themselves.

    Args:
        query: [B, H, T, D]; key, value: [B, H_kv, K, D] with K - T < window, so that the mask stays small.
    """
    if has_flash_kernel(query.device, query.dtype):
        return newest_attention(query, key, value, scaling, window)
    queries, keys = query.shape[2], key.shape[2]
    row = torch.arange(keys - queries, keys, device=query.device)[:, None]
    column = torch.arange(keys, device=query.device)[None]
    visible = (column <= row) & (column > row - window)
    stacked = _stack_groups(query, key.shape[1])
    visible = visible.repeat(stacked.shape[2] // queries, 1)
    if query.device.type == "cpu":
        bias = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, float("-inf"))
        output, lse = flash_attention(stacked, key, value, scaling, mask=bias)
    else:
        output, lse = masked_attention(stacked, key, value, scaling, visible)
    return _unstack_groups(output, lse, query)


def attention_row(query: Tensor, lse: Tensor, key: Tensor, scaling: float) -> Tensor:
    """One query's attention over the cached keys, mean over heads, in float32 ("Cross-model Retrieval").

    Costs one [H, D] x [N, D] product, because the query and its log-sum-exp were kept from the forward pass.

    Args:
        query: [H, D]; lse: [H]; key: [H_kv, N, D].
    Returns:
        [N], summing to 1 when the keys are exactly those the query attended to.
    """
    grouped = query.float().view(key.shape[0], -1, query.shape[-1])
    lse = lse.float().view(key.shape[0], -1, 1)
    total = torch.zeros(key.shape[1], device=key.device)
    for head in range(key.shape[0]):  # one head at a time bounds the float32 copy of half-precision keys
        scores = grouped[head] @ key[head].float().T
        total += scores.mul_(scaling).sub_(lse[head]).exp_().sum(0)
    return total / query.shape[0]


def _stack_groups(query: Tensor, kv_heads: int) -> Tensor:
    """[B, H, T, D] -> [B, H_kv, G * T, D]: the G query heads that share a KV head become rows of one tile."""
    batch, heads, queries, dim = query.shape
    if heads == kv_heads:
        return query
    return query.reshape(batch, kv_heads, heads // kv_heads * queries, dim)


def _unstack_groups(output: Tensor, lse: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    return output.reshape(query.shape), lse.reshape(query.shape[:3])


def _full_mask(queries: int, keys: int, tail: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """[T, N + tail] bool: the prefix visible to all, the tail under `mask` (None: causal)."""
    if mask is not None and tail == keys:
        return mask
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if mask is None:
        return visible.tril_(keys - queries)
    visible[:, keys - tail :] = mask
    return visible
