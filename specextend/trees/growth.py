"""How far a draft tree grows: what one round may draft, whoever decided it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specextend.config import TreeConfig


class Calibration(Protocol):
    """What a draft's probabilities are worth: how often the target makes the same choice."""

    def __call__(self, logprobs: Tensor) -> Tensor:
        """Log-probability, of the same shape, that the target chooses children with these `logprobs`."""


@dataclass(frozen=True)
class Growth:
    """Bounds of one tree.

    Attributes:
        nodes, max_depth: as in `TreeConfig`.
        threshold: a level must add at least this to the expected accepted length for another one to follow.
        floor: paths less probable than this are left out.
        calibration: None takes the draft's probabilities for what they say.
    """

    nodes: int
    max_depth: int
    threshold: float
    floor: float = 0.0
    calibration: Calibration | None = None

    @classmethod
    def of(cls, config: TreeConfig) -> Growth:
        """The same bounds in every round."""
        return cls(config.nodes, config.max_depth, config.threshold, config.min_probability)
