"""How the target chooses tokens (lossless verification).

The target's choice at output position n is a function of its logits and of noise that belongs to n alone (none for
greedy decoding). A draft token is accepted when it *is* that choice. So the output is token for token what the target
alone would produce with the same seed, and, sampled, its distribution is exactly the target's: each child of a node is
accepted with the target's probability for it, which is also what recursive rejection over deterministic children gives.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from specextend.config import SamplingConfig
from specextend.trees.tree import Nodes


class Chooser(Protocol):
    """The target's rule for the next token, for one generation."""

    def __call__(self, logits: Tensor, tree: Nodes, first: int) -> Tensor:
        """Tokens [T] for `logits` [T, V] after the nodes of `tree`; node i chooses position `first + depth[i]`."""


def chooser(sampling: SamplingConfig, depth: int = 0) -> Chooser:
    """Greedy at temperature 0, else sampling with a fresh noise stream.

    Args:
        depth: of the deepest tree that will be shown to it.
    """
    return greedy if sampling.temperature == 0 else Sampler(sampling, depth + 1)


def greedy(logits: Tensor, tree: Nodes, first: int) -> Tensor:
    """The most probable token of each row; position plays no part."""
    return logits.argmax(-1)


class Sampler:
    """Samples by the Gumbel trick: argmax of log-probability plus the noise of the output position.

    Lives for one generation: noise of positions behind `first` is dropped, that ahead is kept until it is used. It
    waits for no value of the device, so that it follows a captured verification without a gap.

    Args:
        positions: output positions that one call may choose for.
    """

    def __init__(self, sampling: SamplingConfig, positions: int):
        self._sampling, self._positions = sampling, positions
        self._generator: torch.Generator | None = None
        self._rows: list[Tensor] = []  # noise [V] of positions self._first, self._first + 1, ...
        self._first = 0

    def __call__(self, logits: Tensor, tree: Nodes, first: int) -> Tensor:
        noise = self.noise(first, first + self._positions, logits)
        return (filtered(logits, self._sampling) + noise[tree.depth.long()]).argmax(-1)

    def noise(self, first: int, end: int, like: Tensor) -> Tensor:
        """Gumbel noise [end - first, V], float32; row by row, so that it does not depend on who asks for how many."""
        if self._generator is None:
            self._generator = torch.Generator(like.device).manual_seed(self._sampling.seed)
        while self._first + len(self._rows) < end:
            row = torch.empty(like.shape[-1], dtype=torch.float32, device=like.device)
            self._rows.append(row.exponential_(generator=self._generator).log_().neg_())
        del self._rows[: first - self._first]
        self._first = first
        return torch.stack(self._rows[: end - first])


def filtered(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Logits [T, V] over temperature, -inf outside top-k and then the nucleus (the smallest set of mass top_p)."""
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature  # no overflow, however cold
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(-1, index, outside), float("-inf"))
    return logits
