"""Looking at a generation from outside: what was kept, drafted, verified and accepted, round by round."""

from __future__ import annotations

from torch import Tensor

from specextend.trees.tree import DraftTree


class Observer:
    """Told of every step by the backend, with copies of its own; this one does nothing.

    Watching costs copies and waits of the host: do not time a generation that is watched.
    """

    def refreshed(self, round: int, positions: Tensor, context: int) -> None:
        """Before round `round` the draft's working cache became `positions` [m] of its `context` tokens."""

    def drafted(self, tree: DraftTree) -> None:
        """The draft proposed `tree`."""

    def verified(self, tree: DraftTree, logits: Tensor) -> None:
        """The target's `logits` [T, V] after every node of `tree`."""

    def accepted(self, path: Tensor) -> None:
        """The nodes `path` [A] of that tree were accepted, the root first."""
