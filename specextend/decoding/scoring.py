"""The target's log-probabilities of tokens that are given, with a cache of their own: no generation is disturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specextend.modeling.attention import attention
from specextend.modeling.blocks import blocks
from specextend.modeling.cache import KVCache
from specextend.modeling.rope import DynamicRope
from specextend.models.loading import LoadedModels
from specextend.trees.tree import DraftTree

BLOCK = 128  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class TokenScore:
    """A token and what the target thought of it.

    Attributes:
        logprob: None for a prompt's first token, which follows nothing.
        top: (token, log-probability) of the most probable tokens in its place, the best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def score(
    models: LoadedModels, ids: Tensor, top: int, on_block: Callable[[int], None] | None = None
) -> list[TokenScore]:
    """Scores of the tokens `ids` [N], each behind those before it.

    Args:
        top: how many alternatives to tell.
        on_block: told every few tokens how many are scored; what it raises ends it.
    """
    scores = [TokenScore(int(ids[0]), None)]
    with models.lock():
        cache = KVCache(models.target.config, models.dtype, models.device)
        how = attention(hybrid=True)
        target = models.make_target(models.target, cache, how, how, None)
        cache.reset(len(ids))
        rotary = models.target.get_decoder().rotary_emb
        if isinstance(rotary, DynamicRope):
            rotary.prompt_length = len(ids)
        for block in blocks(0, len(ids) - 1, BLOCK, on_block):
            logits = target.verify(DraftTree.chain(ids[block]))
            target.commit(torch.arange(block.stop - block.start, device=ids.device))
            scores += scores_of(logits, ids[block.start + 1 : block.stop + 1].tolist(), top)
    return scores


def scores_of(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenScore]:
    """Scores of `tokens`, one for each row of `logits` [T, V]."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    best = logprobs.topk(top, dim=-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    tops = [tuple(zip(*pair, strict=True)) for pair in pairs]
    return [TokenScore(*one) for one in zip(tokens, own, tops, strict=True)]
