"""Prompt lookup: drafts copied from the context, the cheapest rival of any draft model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specextend.drafting.drafter import Drafter
from specextend.drafting.ngrams import continuation
from specextend.modeling.blocks import OnBlock
from specextend.trees.acceptance import Accepted
from specextend.trees.growth import Growth
from specextend.trees.tree import DraftTree

if TYPE_CHECKING:
    from specextend.drafting.captured import CapturedDraft
    from specextend.modeling.llama_blocks import Workspaces


class PromptLookup(Drafter):
    """Proposes what followed the newest tokens where they last stood in the context.

    Args:
        length: draft tokens at most.
    """

    def __init__(self, length: int):
        self._length = length
        self._context = torch.empty(0, dtype=torch.long)

    @property
    def context(self) -> int:
        return len(self._context)

    def prefill(
        self, prompt: Tensor, first: Tensor, extra_slots: int, known: int = 0, on_block: OnBlock | None = None
    ) -> None:
        self._context = torch.cat((prompt, first.reshape(1)))

    def propose(self, growth: Growth) -> DraftTree:
        length = torch.tensor(len(self._context), device=self._context.device)
        tokens, exist = continuation(self._context, length, self._length)
        return DraftTree.chain(torch.cat((self._context[-1:], tokens[exist])))

    def commit(self, accepted: Accepted) -> None:
        self._context = torch.cat((self._context, accepted.tokens, accepted.bonus.reshape(1)))

    def captured(self, workspaces: Workspaces) -> CapturedDraft:
        from specextend.drafting.captured import LookupDraft

        return LookupDraft(self._length, lambda: self._context, workspaces.device)
