"""An EAGLE head in captured rounds; caches, tree and retrieval are `specextend.drafting.captured`'s."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eagle.heads import Eagle1Head, Eagle3Head, Head
from specextend.drafting.captured import TreeDraft
from specextend.kernels import linear
from specextend.kernels.elementwise import rms_norm
from specextend.kernels.tree import TreeBuffers
from specextend.modeling.cache import DraftCache
from specextend.modeling.fused_target import FusedTarget
from specextend.modeling.llama_blocks import FusedBlock, Slots, Workspaces, as_norm


class EagleDraft(TreeDraft):
    """Pairs (token, state before it) through the head's one block; see `EagleDrafter` for what is cached where.

    Args:
        root_state: gives the state [1, H] of the root's pair after the drafter's prefill.
    """

    def __init__(
        self, head: Head, root_state: Callable[[], Tensor], cache: DraftCache, tree: TreeBuffers,
        workspaces: Workspaces, depth: int, *, dense: bool, scratch: int,
    ):  # fmt: skip
        super().__init__(cache, tree, depth, dense=dense, scratch=scratch)
        weight, tables = head.fc.weight, self._rope.tables(self.working.capacity)
        self._head, self._root_state, self.target_ids = head, root_state, head.target_ids
        self._blocks, self._workspaces = [FusedBlock(head.layers[0], *tables, workspaces)], workspaces
        self._states = weight.new_zeros(len(tree.emitted), len(weight))
        self._hidden = weight.new_zeros(1, len(weight))

    @property
    def state(self) -> list[Tensor]:
        return [*super().state, self._states]

    def begin(self, first: Tensor) -> None:
        super().begin(first)
        self._states[0] = self._root_state()[0]

    def follow(self, target: FusedTarget) -> None:
        self._states.copy_(self._head.states(target.features.index_select(0, self._tree.path)))

    def follow_alone(self, target: FusedTarget) -> None:
        self._states.index_copy_(0, (self._tree.count - 1).reshape(1), self._head.states(target.features[:1]))

    def absorb(self) -> None:
        newest = self._states.index_select(0, (self._tree.count - 1).reshape(1))
        super().absorb()
        self._states[:1] = newest

    def _read_newest(self, tokens, count, *, mask):
        hidden = self._run(tokens, self._states.clone(), self._newest, full=self._full_layer(0), mask=mask)
        self._hidden = hidden.index_select(0, (count - 1).reshape(1))
        return self._head_logits(self._hidden)

    def _read_level(self, tokens, below, slots, **where):
        self._hidden = self._run(tokens, self._hidden.index_select(0, below), slots, **where)
        return self._head_logits(self._hidden, where["active"])

    def _run(self, tokens: Tensor, states: Tensor, slots: Slots, **rest) -> Tensor:
        """Block output [T, H] of pairs."""
        residual, entry = self._entry(self._head.embed_tokens(tokens), states)
        return self._blocks[0].run(residual, slots, self.working.layer(0), entry=entry, **rest)

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
