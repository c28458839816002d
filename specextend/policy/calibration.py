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
        self.fade(1)
        self._offered += offered
        self._given += given
        self._accepted += accepted

    def fade(self, rounds: int) -> None:
        """Let so many rounds pass."""
        for counts in (self._offered, self._given, self._accepted):
            counts *= 0.5 ** (rounds / HALF_LIFE)
        self._table = None

    @property
    def table(self) -> NDArray[np.float64]:
        """Log-probability [3, 13] of acceptance where the draft says 0, -1/16, -4/16, -9/16, ..., by depth."""
        if self._table is None:
            self._table = self._fitted()
        return self._table

    def __call__(self, logprobs: Tensor, depth: int) -> Tensor:
        given, row = logprobs.double().cpu().numpy(), self.table[min(depth, DEPTHS) - 1]
        # beyond the last knot a log-probability falls as the draft's own
        worth = np.interp(given, self._knots[::-1], row[::-1]) + np.minimum(given - self._knots[-1], 0.0)
        return torch.from_numpy(worth).to(logprobs)

    def _fitted(self) -> NDArray[np.float64]:
        """Shift the knots by what the cells beside them say, from all depths to each."""
        middle = np.exp(-(((np.arange(CELLS) + 0.5) / 4) ** 2))
        pooled = self._shift(self._offered.sum(0), self._given.sum(0), self._accepted.sum(0), middle, PRIOR)
        rows = []
        for offered, given, accepted in zip(self._offered, self._given, self._accepted, strict=True):
            expected = np.minimum(middle * np.exp(pooled), 1.0)
            shift = pooled + self._shift(offered, given * np.exp(pooled), accepted, expected, POOLED)
            known = offered + 0.1 * self._offered.sum(0) + 0.1
            weights = np.convolve(known, [1.0, 1.0])
            ends = np.convolve(known * shift, [1.0, 1.0]) / weights  # a knot lies between two cells
            rows.append(_descending(np.minimum(self._knots + ends, 0.0), weights))
        return np.stack(rows)

    @staticmethod
    def _shift(offered, given, accepted, expected, prior: float) -> NDArray[np.float64]:
        """Log of the ratio of what was accepted to what was promised, `prior` samples of a ratio of 1 included."""
        found = (accepted + prior * expected) / (offered + prior)
        promised = (given + prior * expected) / (offered + prior)
        return np.log(np.clip(found, LEAST, 1.0)) - np.log(np.clip(promised, LEAST, 1.0))


def _descending(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest sequence that never rises: neighbours that would are given their weighted mean."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] < block[0]:
            mean, before, length = blocks.pop()
            total = before + block[1]
            block = ((mean * before + block[0] * block[1]) / total, total, length + block[2])
        blocks.append(block)
    return np.repeat([mean for mean, _, _ in blocks], [length for _, _, length in blocks])


def cell_of(logprobs: NDArray[np.float64]) -> NDArray[np.int64]:
    """The cell of each log-probability."""
    return np.minimum(np.sqrt(np.maximum(-logprobs, 0.0)) * 4, CELLS - 1).astype(np.int64)


def group_of(depth: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of the table for children of `depth`."""
    return np.minimum(depth, DEPTHS) - 1
