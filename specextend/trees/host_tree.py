"""Draft trees in the host's memory, where it is decided what of them is verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from specextend.trees.tree import DraftTree

WORD = 32  # ancestors in one integer


@dataclass(frozen=True)
class HostTree:
    """A tree before or after the cut; all [T], node 0 is the root, and parents precede their children.

    Attributes:
        tokens, parents, depth, logprobs, reach: as in `DraftTree`.
    """

    tokens: NDArray
    parents: NDArray
    depth: NDArray
    logprobs: NDArray
    reach: NDArray

    @classmethod
    def of(cls, tree: DraftTree) -> HostTree:
        ids = (one.cpu().numpy() for one in (tree.tokens, tree.parents, tree.depth))
        return cls(*ids, *(one.double().cpu().numpy() for one in (tree.logprobs, tree.reach)))

    def __len__(self) -> int:
        return len(self.tokens)

    def joined(self, tokens: Sequence[int], reach: NDArray[np.float64]) -> HostTree:
        """With one more path below the root; where it goes over nodes that are there, the more hopeful view holds.

        Args:
            tokens: [m]; reach: [m] log-probability that the target accepts them, falling.
        """
        if not len(tokens):
            return self
        ids, parents = self.tokens.tolist(), self.parents.tolist()
        at, lifted, new = 0, {0: 0.0}, []
        for token, hope in zip(tokens, reach.tolist(), strict=True):
            below = [node for node, parent in enumerate(parents) if parent == at and ids[node] == token]
            if below:
                at = below[0]
            else:
                ids.append(token), parents.append(at), new.append(hope)
                at = len(ids) - 1
            lifted[at] = hope
        before, after = self.reach.tolist(), [0.0]
        for node in range(1, len(ids)):
            parent = parents[node]
            own = before[node] - before[parent] + after[parent] if node < len(before) else new[node - len(before)]
            after.append(min(max(own, lifted.get(node, own)), after[parent]))
        extra = np.array([after[node] - after[parents[node]] for node in range(len(before), len(ids))])
        depth = self.depth.tolist()
        for node in range(len(before), len(ids)):
            depth.append(depth[parents[node]] + 1)
        logprobs = np.concatenate((self.logprobs, extra))
        return HostTree(np.array(ids), np.array(parents), np.array(depth), logprobs, np.array(after))

    def most_probable(self, nodes: int) -> HostTree:
        """The root and the `nodes` nodes below it that are most probably accepted."""
        if nodes >= len(self) - 1:
            return self
        # ties go to the older node, so to parents before children
        kept = np.sort(np.argsort(-self.reach, kind="stable")[: nodes + 1])
        renumber = np.full(len(self) + 1, -1)  # the root's parent is -1, the last place
        renumber[kept] = np.arange(len(kept))
        cut = (one[kept] for one in (self.tokens, renumber[self.parents], self.depth, self.logprobs, self.reach))
        return HostTree(*cut)

    def expected(self, nodes: int) -> float:
        """Draft tokens that are expected to be accepted if the `nodes` most probable nodes are verified."""
        return float(np.exp(np.sort(self.reach[1:])[::-1][:nodes]).sum())

    def ancestors(self) -> NDArray[np.bool_]:
        """[T, T]: who lies on the path from the root to whom, as in `DraftTree`."""
        seen = np.eye(len(self), dtype=bool)
        for node in range(1, len(self)):
            seen[node] |= seen[self.parents[node]]
        return seen

    def on(self, device: torch.device) -> DraftTree:
        """The same tree for a target on `device`."""
        fields = (self.tokens, self.parents, self.depth, self.ancestors())
        tree = DraftTree(*(torch.from_numpy(one).to(device) for one in fields))
        return replace(tree, logprobs=torch.from_numpy(self.logprobs), reach=torch.from_numpy(self.reach))
