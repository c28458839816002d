"""Draft trees in the host's memory, where it is decided what of them is verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from specextend.trees.tree import DraftTree


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
        ids, parents, depth, after = (one.tolist() for one in (self.tokens, self.parents, self.depth, self.reach))
        known = len(self)
        children = dict(zip(zip(parents, ids, strict=True), range(known), strict=True))
        at, lifted = 0, {}
        for token, hope in zip(tokens, reach.tolist(), strict=True):
            below = children.get((at, token))
            if below is None:
                hope = min(hope, lifted.get(at, after[at]))
                ids.append(token), parents.append(at), depth.append(depth[at] + 1), after.append(hope)
                at = len(ids) - 1
            else:
                at = below
                lifted[at] = max(hope, after[at])
        if any(hope > after[node] for node, hope in lifted.items()):  # what is below them rises with them
            before = after
            after = [0.0]
            for node in range(1, known):
                own = before[node] - before[parents[node]] + after[parents[node]]
                after.append(min(max(own, lifted.get(node, own)), after[parents[node]]))
            after += before[known:]
        extra = [after[node] - after[parents[node]] for node in range(known, len(ids))]
        return HostTree(*map(np.array, (ids, parents, depth, [*self.logprobs.tolist(), *extra], after)))

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
        nodes, size = len(self), -(-len(self) // 8)
        packed = b"".join(bits.to_bytes(size, "little") for bits in self.ancestor_bits())
        seen = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little").reshape(nodes, -1)
        return seen[:, :nodes].astype(bool)

    def ancestor_bits(self) -> list[int]:
        """Of each node the path to it: bit j is set where node j lies on it, its own bit, too."""
        paths = [1]
        for node, parent in enumerate(self.parents[1:].tolist(), 1):
            paths.append(paths[parent] | 1 << node)
        return paths

    def on(self, device: torch.device) -> DraftTree:
        """The same tree for a target on `device`."""
        fields = (self.tokens, self.parents, self.depth, self.ancestors())
        tree = DraftTree(*(torch.from_numpy(one).to(device) for one in fields))
        return replace(tree, logprobs=torch.from_numpy(self.logprobs), reach=torch.from_numpy(self.reach))
