"""Which draft tokens the target accepts: those that are its own choice (lossless verification)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specextend.trees.tree import DraftTree


@dataclass(frozen=True)
class Accepted:
    """The verdict on a tree.

    Attributes:
        path: [A] accepted nodes, root first.
        tokens: [A - 1] accepted draft tokens.
        bonus: [] the target's own token after them; roots the next tree.
    """

    path: Tensor
    tokens: Tensor
    bonus: Tensor


def accept(tree: DraftTree, chosen: Tensor) -> Accepted:
    """Follow the target's choices down the tree.

    Args:
        chosen: [T] the target's token after each node.
    """
    if len(tree) == 1:  # autoregressive decoding
        return Accepted(tree.depth, tree.tokens[1:], chosen[0])
    matches = tree.tokens == chosen[tree.parents.clamp(min=0)]
    matches[0] = True
    on_path = (matches | ~tree.ancestors).all(dim=-1)
    path = on_path.nonzero()[:, 0]
    return Accepted(path, tree.tokens[path[1:]], chosen[path[-1]])
