"""Draft trees: tokens to verify, and who descends from whom ("Hybrid Tree Attention")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Nodes(Protocol):
    """What the target verifies and chooses for: a `DraftTree`, or a tree in buffers of fixed size on the device.

    Attributes:
        tokens, parents, depth: [T]; used: [T], 0 or false where a slot holds no node.
    """

    tokens: Tensor
    parents: Tensor
    depth: Tensor
    used: Tensor


@dataclass(frozen=True)
class DraftTree:
    """Tokens to verify; node 0 is the root, a token already emitted, and parents precede their children.

    Attributes:
        tokens, parents, depth: [T]; parents[0] = -1, depth[0] = 0.
        ancestors: [T, T] bool; ancestors[i, j]: node j lies on the path from the root to node i (itself included).
        logprobs: [T] what the draft gave each node after its parent; None where no model drafted.
        reach: [T] log-probability that the target accepts a node, by all that is known; None as for `logprobs`.
    """

    tokens: Tensor
    parents: Tensor
    depth: Tensor
    ancestors: Tensor
    logprobs: Tensor | None = None
    reach: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def used(self) -> Tensor:
        """[T] bool: every node is one."""
        return torch.ones_like(self.tokens, dtype=torch.bool)

    @classmethod
    def root(cls, token: Tensor) -> DraftTree:
        """The tree of `token` [] alone: verifying it is one step of autoregressive decoding."""
        zero = torch.zeros(1, dtype=torch.long, device=token.device)
        return cls(token.reshape(1), zero - 1, zero, torch.ones(1, 1, dtype=torch.bool, device=token.device))

    @classmethod
    def chain(cls, tokens: Tensor) -> DraftTree:
        """The path of `tokens` [T], the root first."""
        depth = torch.arange(len(tokens), device=tokens.device)
        return cls(tokens, depth - 1, depth, depth[:, None] >= depth)

    @classmethod
    def from_parents(cls, tokens: Tensor, parents: Tensor) -> DraftTree:
        """Depth and ancestors of nodes [T] whose parents precede them."""
        ancestors = torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)
        above = parents.clone()
        while bool((above >= 0).any()):
            has = above >= 0
            ancestors[has.nonzero()[:, 0], above[has]] = True
            above = torch.where(has, parents[above.clamp(min=0)], -1)
        return cls(tokens, parents, ancestors.sum(-1) - 1, ancestors)
