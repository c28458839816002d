"""A captured round: target and draft with the verdict of the last round between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specextend.drafting.fused import FusedDraft
from specextend.drafting.retrieval import Retriever
from specextend.kernels.tree import TreeBuffers
from specextend.modeling.fused_target import FusedTarget, Root

Choose = Callable[[Tensor, Tensor], Tensor]  # the target's rule: logits [T, V] and depth [T] to tokens [T]


class FusedRound:
    """Target and draft with the verdict of the last round between them.

    `begin`, then every round `refresh` if it is due, `draft`, `verify`, `accept`, `read`.
    """

    def __init__(self, target: FusedTarget, draft: FusedDraft, tree: TreeBuffers, max_depth: int):
        self.target, self.drafter, self.tree = target, draft, tree
        self._max_depth = max_depth
        self._chosen = torch.zeros(tree.slots, dtype=torch.int64, device=tree.tokens.device)
        self._report = torch.zeros(2 + len(tree.emitted), dtype=torch.int64, device=tree.tokens.device)

    @property
    def is_current(self) -> bool:
        return self.target.cache.is_current and self.drafter.is_current

    def begin(self, first: Tensor) -> None:
        """Go on from a prefill of both models whose token was `first` []."""
        self.target.take_over()
        self.drafter.take_over()
        self.tree.emitted[0] = first
        self.tree.count.fill_(1)
        self.tree.newest.zero_()

    def refresh(self, retriever: Retriever) -> None:
        """Refill the draft's working cache with what the target attends to, or with the window."""
        row = self.target.attention_row(self.tree.newest) if retriever.reads_attention else None
        self.drafter.refresh(row, retriever.config)

    def draft(self) -> None:
        """Grow a tree below the newest token."""
        tree = self.tree
        root = tree.emitted.index_select(0, (tree.count - 1).reshape(1))
        logits = self.drafter.catch_up()
        tree.begin()
        for level in range(self._max_depth):
            if level:
                logits = self.drafter.expand(level - 1)
            tree.add_level(logits, level, self.drafter.target_ids)
        tree.finish(root)

    def verify(self, choose: Choose) -> None:
        """Let the target choose a token after every node."""
        self._chosen.copy_(choose(self.target.verify(self.tree), self.tree.depth))

    def accept(self) -> None:
        """Keep what the target agrees to."""
        tree, cache = self.tree, self.target.cache
        tree.accept(self._chosen, cache.length)
        tree.compact(cache.keys, cache.values)
        self.drafter.take(self.target.features)
        self._report[0] = tree.used.sum() - 1
        self._report[1] = tree.count
        self._report[2:] = tree.emitted

    def read(self) -> tuple[int, list[int]]:
        """Drafted tokens and the round's tokens, the bonus token last; the one time that the host waits."""
        drafted, count, *emitted = self._report.tolist()
        return drafted, emitted[:count]


class FusedDecoder:
    """Autoregressive decoding by the same launches: the baseline that speedups are measured against."""

    def __init__(self, target: FusedTarget):
        self.target, self.root = target, Root(target.cache.length.device)

    @property
    def is_current(self) -> bool:
        return self.target.cache.is_current

    def begin(self, first: Tensor) -> None:
        self.target.take_over()
        self.root.tokens[0] = first

    def step(self, choose: Choose) -> None:
        """One token."""
        self.root.tokens.copy_(choose(self.target.verify(self.root), self.root.depth))
        self.target.cache.length += 1

    def read(self) -> int:
        return int(self.root.tokens)
