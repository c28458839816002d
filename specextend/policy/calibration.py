"""What a draft's probabilities are worth: learned from the verdicts on the nodes it proposed, prompt by prompt.

A child of an accepted node is one yes/no sample: either it is the target's choice or not. Samples are counted by the
probability that the draft gave, in cells that are narrow where it is sure, and by depth. The result is a piecewise
linear function of log-probability, so that a captured step can look it up in a table.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CELLS = 12  # of -log(probability): cell k reaches from (k / 4)^2 to ((k + 1) / 4)^2, the last one to infinity
DEPTHS = 3  # children of the root, their children, all deeper ones
HALF_LIFE = 64  # rounds after which a sample counts half
PRIOR = 4.0  # samples that say that the draft's probabilities are true, in every cell
POOLED = 8.0  # samples, in every cell of a depth, that say what those of all depths say
LEAST = 1e-4  # acceptance that no cell is believed to be below


class Calibration:
    """How often the target makes the draft's choice, by the probability that the draft gave it."""

    def __init__(self) -> None:
        self._offered, self._given, self._accepted = (np.zeros((DEPTHS, CELLS)) for _ in range(3))
        self._knots = -((np.arange(CELLS + 1) / 4) ** 2)  # log-probabilities
        self._table: NDArray[np.float64] | None = None

    def learn(self, logprobs: NDArray[np.float64], depth: NDArray[np.int64], accepted: NDArray[np.bool_]) -> None:
        """Take in a round: what the draft gave each child of an accepted node, and whether it was accepted.

        Args:
            logprobs: [n] after the parent; depth: [n] of the child, at least 1; accepted: [n].
        """
        at = group_of(depth), cell_of(logprobs)
        counts = [np.zeros((DEPTHS, CELLS)) for _ in range(3)]
        for total, weights in zip(counts, (1.0, np.exp(logprobs), accepted), strict=True):
            np.add.at(total, at, weights)
        self.learn_counts(*counts)

    def learn_counts(self, offered: NDArray, given: NDArray, accepted: NDArray) -> None:
        """Take in a round that is counted already: samples, their summed probabilities and those accepted, [3, 12]."""
        fades = 0.5 ** (1 / HALF_LIFE)
        self._offered = self._offered * fades + offered
        self._given = self._given * fades + given
        self._accepted = self._accepted * fades + accepted
        self._table = None

    @property
    def table(self) -> NDArray[np.float64]:
        """Log-probability [3, 13] of acceptance where the draft says 0, -1/16, -4/16, -9/16, ..., by depth."""
        if self._table is None:
            self._table = self._fitted()
        return self._table

    def __call__(self, logprobs: Tensor, depth: int) -> Tensor:
        row = torch.as_tensor(self.table[min(depth, DEPTHS) - 1], dtype=logprobs.dtype, device=logprobs.device)
        scaled = (-logprobs).clamp(min=0).sqrt() * 4
        left = scaled.long().clamp(max=CELLS - 1)
        # beyond the last knot a log-probability falls as the draft's own
        lower, upper = row[left], row[left + 1]
        knot, next_knot = -((left / 4) ** 2), -(((left + 1) / 4) ** 2)
        inside = lower + (upper - lower) * ((logprobs - knot) / (next_knot - knot)).to(logprobs.dtype)
        return torch.where(scaled < CELLS, inside, row[-1] + logprobs + (CELLS / 4) ** 2).clamp(max=0)

    def _fitted(self) -> NDArray[np.float64]:
        """Shift the knots by what the cells beside them say, from all depths to each."""
        middle = np.exp(-(((np.arange(CELLS) + 0.5) / 4) ** 2))
        pooled = self._shift(self._offered.sum(0), self._given.sum(0), self._accepted.sum(0), middle, PRIOR)
        rows = []
        for offered, given, accepted in zip(self._offered, self._given, self._accepted, strict=True):
            expected = np.minimum(middle * np.exp(pooled), 1.0)
            shift = pooled + self._shift(offered, given * np.exp(pooled), accepted, expected, POOLED)
            ends = np.concatenate((shift[:1], (shift[:-1] + shift[1:]) / 2, shift[-1:]))
            rows.append(np.maximum.accumulate(np.minimum(self._knots + ends, 0.0)[::-1])[::-1])
        return np.stack(rows)

    @staticmethod
    def _shift(offered, given, accepted, expected, prior: float) -> NDArray[np.float64]:
        """Log of the ratio of what was accepted to what was promised, `prior` samples of a ratio of 1 included."""
        found = (accepted + prior * expected) / (offered + prior)
        promised = (given + prior * expected) / (offered + prior)
        return np.log(np.clip(found, LEAST, 1.0)) - np.log(np.clip(promised, LEAST, 1.0))


def cell_of(logprobs: NDArray[np.float64]) -> NDArray[np.int64]:
    """The cell of each log-probability."""
    return np.minimum(np.sqrt(np.maximum(-logprobs, 0.0)) * 4, CELLS - 1).astype(np.int64)


def group_of(depth: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of the table for children of `depth`."""
    return np.minimum(depth, DEPTHS) - 1
