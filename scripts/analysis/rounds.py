"""The rounds of a generation as an observer of the engine sees them, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specextend.trees.tree import DraftTree


@dataclass(frozen=True)
class Refresh:
    """Positions [M] that the draft's working cache took, of so many tokens of context."""

    positions: Tensor
    context: int


@dataclass(frozen=True)
class SeenRound:
    """A round: its tree, the target's logits [A, V] along the accepted path, and the refresh before it, if any."""

    tree: DraftTree
    logits: Tensor
    refresh: Refresh | None


class Watcher:
    """An observer (`specextend.decoding.observer`) that keeps the rounds; what it keeps is its own copy."""

    def __init__(self) -> None:
        self.rounds: list[SeenRound] = []
        self._refresh: Refresh | None = None

    def refreshed(self, round: int, positions: Tensor, context: int) -> None:
        self._refresh = Refresh(positions.clone(), context)

    def drafted(self, tree: DraftTree) -> None:
        self._tree = DraftTree.from_parents(tree.tokens.clone(), tree.parents.clone())

    def verified(self, tree: DraftTree, logits: Tensor) -> None:
        self._logits = logits

    def accepted(self, path: Tensor) -> None:
        self.rounds.append(SeenRound(self._tree, self._logits[path].clone(), self._refresh))
        self._refresh = None


def token_entropies(rounds: Sequence[SeenRound]) -> dict[str, list]:
    """Of every token of the output: the target's entropy in nats, and 1 where an accepted draft had it right."""
    entropies, drafted = [], []
    for one in rounds:
        logs = one.logits.float().log_softmax(-1)
        entropies += [round(-value, 4) for value in (logs.exp() * logs).sum(-1).tolist()]
        drafted += [1] * (len(one.logits) - 1) + [0]
    return {"entropy": entropies, "accepted": drafted}


def chosen_chunks(rounds: Sequence[SeenRound], chunk_size: int) -> dict[str, Any]:
    """Chunk indices of each refresh, with its round and the context it chose from."""
    found = [(index, one.refresh) for index, one in enumerate(rounds) if one.refresh is not None]
    return {
        "chunk_size": chunk_size,
        "round": [index for index, _ in found],
        "context": [refresh.context for _, refresh in found],
        "chosen": [torch.unique(refresh.positions // chunk_size).tolist() for _, refresh in found],
    }


def middle_tree(rounds: Sequence[SeenRound]) -> DraftTree:
    """The tree of median size."""
    return sorted(rounds, key=lambda one: len(one.tree))[len(rounds) // 2].tree


def mean_depth(rounds: Sequence[SeenRound]) -> float:
    """Levels of a tree, on average: the draft's passes in a round."""
    return sum(max(1, int(one.tree.depth.max())) for one in rounds) / len(rounds)


def predicted_speedup(tau: float, passes: float, *, draft_ms: float, verify_ms: float, target_ms: float) -> float:
    """Equation 1: time per token / T_target = (1 / tau) * (d * T_draft / T_target + T_verify / T_target).

    Args:
        tau: tokens per round, the bonus token included.
        passes: d, the draft's passes in a round.
    """
    return tau * target_ms / (passes * draft_ms + verify_ms)
