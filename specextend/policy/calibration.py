"""What a draft's probabilities are worth: learned from the verdicts on the nodes it proposed, prompt by prompt.

A child of an accepted node is one yes/no sample: either it is the target's choice or not. Samples are counted by the
probability that the draft gave, in cells that are narrow where it is sure. The result is a piecewise linear function
of log-probability, so that a captured step can look it up in a table. Cells of their own for every depth were tried:
they learn more slowly and promise no better.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specextend.config import CALIBRATION_CELLS

CELLS = (
    CALIBRATION_CELLS  # of -log(probability): cell k reaches from (k / 4)^2 to ((k + 1) / 4)^2, the last to infinity
)
HALF_LIFE = 64  # rounds after which a sample counts half
PRIOR = 4.0  # samples that say that the draft's probabilities are true, in every cell
LEAST = 1e-4  # acceptance that no cell is believed to be below


class Calibration:
    """How often the target makes the draft's choice, by the probability that the draft gave it."""

    def __init__(self) -> None:
        self._offered, self._given, self._accepted = (np.zeros(CELLS) for _ in range(3))
        self._knots = -((np.arange(CELLS + 1) / 4) ** 2)  # log-probabilities
        self._table: NDArray[np.float64] | None = None

    def learn(self, logprobs: NDArray[np.float64], accepted: NDArray[np.bool_]) -> None:
        """Take in a round: what the draft gave each child of an accepted node, and whether it was accepted, [n]."""
        cells = np.minimum(np.sqrt(np.maximum(-logprobs, 0.0)) * 4, CELLS - 1).astype(np.int64)
        self.learn_counts(
            *(np.bincount(cells, one, CELLS) for one in (np.ones(len(cells)), np.exp(logprobs), accepted))
        )

    def learn_counts(self, offered: NDArray, given: NDArray, accepted: NDArray) -> None:
        """Take in a round that is counted already: samples, their summed probabilities and those accepted, [12]."""
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
        """Log-probability [13] of acceptance where the draft says 0, -1/16, -4/16, -9/16, ..."""
        if self._table is None:
            self._table = self._fitted()
        return self._table

    def __call__(self, logprobs: Tensor) -> Tensor:
        given = logprobs.double().cpu().numpy()
        # beyond the last knot a log-probability falls as the draft's own
        worth = np.interp(given, self._knots[::-1], self.table[::-1]) + np.minimum(given - self._knots[-1], 0.0)
        return torch.from_numpy(worth).to(logprobs)

    def _fitted(self) -> NDArray[np.float64]:
        """Shift each knot by what the cells beside it say: the ratio of what was accepted to what was promised."""
        middle = np.exp(-(((np.arange(CELLS) + 0.5) / 4) ** 2))
        found, promised = self._accepted + PRIOR * middle, self._given + PRIOR * middle
        shift = np.log(np.maximum(found / (self._offered + PRIOR), LEAST)) - np.log(promised / (self._offered + PRIOR))
        known = self._offered + 0.1
        weights = np.convolve(known, [1.0, 1.0])
        shifts = np.convolve(known * shift, [1.0, 1.0]) / weights
        return _descending(np.minimum(self._knots + shifts, 0.0), weights)


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
