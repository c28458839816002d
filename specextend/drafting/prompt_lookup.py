"""Prompt lookup: drafts copied from the context, the cheapest rival of any draft model."""

from __future__ import annotations

import torch
from torch import Tensor

from specextend.modeling.features import FeatureTap
from specextend.trees.acceptance import Accepted
from specextend.trees.tree import DraftTree

LONGEST_NGRAM = 3


class PromptLookup:
    """Proposes what followed the newest tokens where they last stood in the context.

    Args:
        length: draft tokens at most.
    """

    tap: FeatureTap | None = None

    def __init__(self, length: int):
        self._length = length
        self._context = torch.empty(0, dtype=torch.long)

    @property
    def context(self) -> int:
        return len(self._context)

    def prefill(self, prompt: Tensor, first: Tensor, extra_slots: int) -> None:
        self._context = torch.cat((prompt, first.reshape(1)))

    def propose(self) -> DraftTree:
        return DraftTree.chain(torch.cat((self._context[-1:], continuation(self._context, self._length))))

    def commit(self, accepted: Accepted) -> None:
        self._context = torch.cat((self._context, accepted.tokens, accepted.bonus.reshape(1)))

    def refresh(self, positions: Tensor) -> None:
        raise AssertionError("prompt lookup has no cache to refresh")


def continuation(context: Tensor, length: int) -> Tensor:
    """Up to `length` tokens after the latest earlier place of `context` [N]'s last 3, 2 or 1 tokens; empty if none."""
    for size in range(min(LONGEST_NGRAM, len(context) - 1), 0, -1):
        ngrams = context[:-1].unfold(0, size, 1)
        places = (ngrams == context[-size:]).all(-1).nonzero()
        if len(places):
            after = int(places[-1]) + size
            return context[after : after + length]
    return context[:0]
