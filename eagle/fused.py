"""An EAGLE head in captured rounds; caches, tree and retrieval are `specextend.modeling.fused_target`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eagle.heads import Eagle1Head, Eagle3Head
from specextend.drafting.fused import FusedDraft
from specextend.kernels import linear
from specextend.kernels.elementwise import rms_norm
from specextend.kernels.tree import TreeBuffers
from specextend.modeling.llama_blocks import FusedBlock, Slots, Workspaces, as_norm

if TYPE_CHECKING:
    from eagle.drafter import EagleDrafter


class FusedEagleDraft(FusedDraft):
    """Pairs (token, state before it) through the head's one block; see `EagleDrafter` for what is cached where."""

    def __init__(self, drafter: EagleDrafter, tree: TreeBuffers, workspaces: Workspaces):
        head = drafter.head
        weight = head.fc.weight
        super().__init__(drafter, tree)
        self._drafter, self._head, self.target_ids = drafter, head, head.target_ids
        self._block, self._workspaces = FusedBlock(head.layers[0], *self._tables, workspaces), workspaces
        self._states = weight.new_zeros(len(tree.emitted), len(weight))
        self._hidden = weight.new_zeros(1, len(weight))

    def take_over(self) -> None:
        super().take_over()
        self._states[0] = self._drafter.root_state[0]

    def take(self, features: Tensor) -> None:
        self._states.copy_(self._head.states(features.index_select(0, self._tree.path)))

    def _read_newest(self, tokens, count):
        hidden = self._run(tokens, self._states.clone(), self._newest, full=self._full_layer(0))
        self._hidden = hidden.index_select(0, (count - 1).reshape(1))
        return self._head_logits(self._hidden)

    def _read_level(self, tokens, below, slots, **where):
        self._hidden = self._run(tokens, self._hidden.index_select(0, below), slots, **where)
        return self._head_logits(self._hidden, where["active"])

    def _run(self, tokens: Tensor, states: Tensor, slots: Slots, **rest) -> Tensor:
        """Block output [T, H] of pairs."""
        residual, entry = self._entry(self._head.embed_tokens(tokens), states)
        return self._block.run(residual, slots, self.working.layer(0), entry=entry, **rest)

    def _entry(self, embedding: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """What the block adds to, a tensor of its own, and what its attention reads."""
        if isinstance(self._head, Eagle1Head):
            mixed = self._head.fc(torch.cat((embedding, states), dim=-1))
            return mixed, mixed
        block = self._head.layers[0]
        state = rms_norm(states, as_norm(block.hidden_norm))
        entry = torch.cat((rms_norm(embedding, as_norm(block.input_layernorm)), state), dim=-1)
        return state if block.norm_before_residual else states, entry

    def _head_logits(self, hidden: Tensor, active: Tensor | None = None) -> Tensor:
        if isinstance(self._head, Eagle3Head):
            hidden = rms_norm(hidden, as_norm(self._head.norm), active)
        return linear.linear(hidden, self._head.lm_head.weight, self._workspaces.linear, active=active)
