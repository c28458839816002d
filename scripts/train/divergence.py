"""The divergence of a head's distribution from the target's, a few thousand pairs at a time.

All logits at once, pairs times vocabulary in float32, would be 13 GB a tensor for 49,152 tokens and 64 rows of 1,024.
Here the gradient is made beside the loss, chunk by chunk, so that nothing of the size of the vocabulary is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 400_000_000  # of one chunk's logits in float32


def divergence(
    hidden: Tensor, weight: Tensor, nexts: Tensor, readout: Tensor, target_ids: Tensor | None, scale: Tensor,
    temperature: float, one_chunk: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:  # fmt: skip
    """Sum over pairs of `scale` times sum_v p(v) (log p(v) - log q(v)), v over the tokens the head knows.

    Args:
        hidden: [n, H] what the head's readout `weight` [V_draft, H] reads; q is its softmax.
        nexts: [n, H] the target's final hidden states, read by `readout` [V, H]; p is its softmax at `temperature`.
        target_ids: [V_draft] target id of each draft id; None: the vocabularies are the same.
        scale: [n] weights of the pairs.
        one_chunk: `chunk_divergence`, compiled perhaps.
    """
    return _Divergence.apply(hidden, weight, nexts, readout, target_ids, scale, temperature, one_chunk)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, nexts, readout, target_ids, scale, temperature, one_chunk):
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, used = hidden.to(dtype or hidden.dtype), weight.to(dtype or weight.dtype)
            trains = ctx.needs_input_grad[1]
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trains else None
            total, grads = hidden.new_zeros((), dtype=torch.float32), []
            chunk = max(1, CHUNK_BYTES // (4 * len(readout)))
            for states, own, scales in zip(
                hidden.split(chunk), nexts.to(readout.dtype).split(chunk), scale.split(chunk), strict=True
            ):
                loss, grad = one_chunk(F.linear(own, readout), F.linear(states, used), target_ids, scales, temperature)
                total += loss
                grad = grad.to(used.dtype)
                grads.append(grad @ used)
                if trains:
                    grad_weight += (grad.mT @ states).float()
        ctx.save_for_backward(torch.cat(grads), grad_weight)
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_hidden, grad_weight = ctx.saved_tensors
        of_weight = None if grad_weight is None else upstream * grad_weight
        return upstream * grad_hidden, of_weight, None, None, None, None, None, None


def chunk_divergence(
    wanted: Tensor, drafted: Tensor, target_ids: Tensor | None, scale: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The loss of a chunk and its gradient by the head's logits `drafted` [n, V_draft]; `wanted` [n, V] logits."""
    wanted = F.log_softmax(wanted.float() / temperature, dim=-1)
    wanted = wanted if target_ids is None else wanted[:, target_ids]
    drafted, p = F.log_softmax(drafted.float(), dim=-1), wanted.exp()
    loss = (scale[:, None] * p * (wanted - drafted)).sum()
    return loss, scale[:, None] * (drafted.exp() * p.sum(-1, keepdim=True) - p)
