"""How the target chooses tokens, and which draft tokens that accepts (lossless verification).

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


class Chooser(Protocol):
    """The target's rule for the next token."""

    def __call__(self, logits: Tensor, first: int, depth: Tensor) -> Tensor:
        """Tokens [T] for `logits` [T, V]; row i chooses output position `first + depth[i]`."""


def chooser(sampling: SamplingConfig) -> Chooser:
    """Greedy at temperature 0, else sampling with a fresh noise stream."""
    return greedy if sampling.temperature == 0 else Sampler(sampling)


def greedy(logits: Tensor, first: int, depth: Tensor) -> Tensor:
    """The most probable token of each row; position plays no part."""
    return logits.argmax(-1)


class Sampler:
    """Samples by the Gumbel trick: argmax of log-probability plus the noise of the output position.

    Lives for one generation: noise of positions behind `first` is dropped, that ahead is kept until it is used.
    """

    def __init__(self, sampling: SamplingConfig):
        self._sampling = sampling
        self._generator: torch.Generator | None = None
        self._rows: list[Tensor] = []  # noise [V] of positions self._first, self._first + 1, ...
        self._first = 0

    def __call__(self, logits: Tensor, first: int, depth: Tensor) -> Tensor:
        noise = self.noise(first, first + int(depth.max()) + 1, logits)
        return (filtered(logits, self._sampling) + noise[depth]).argmax(-1)

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
