"""What the steps of a round cost: measured where they run, corrected by the rounds' own clocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

REPEATS = 3
SHORT = 256  # tokens of the shorter context that verifications are timed at
LONGER = 1.5  # times the longest context that was timed: beyond it they are timed anew
TOO_DEAR = 5.0  # verifications that cost so many times that of one token are not measured: no tree is worth them
RECENT = 9  # rounds whose clocks correct what was measured
FORGETS = 0.95  # weight of the last round's drafting when the next one is known
TRUST = np.diag([1.0, 16.0])  # squares of samples that the measured seconds of reading and of a level stand for


class Curve:
    """Seconds of a step, by rows and by context: between measured rows a line, and one through the two contexts.

    Args:
        rows: measured, ascending; contexts: shorter and longer one, tokens.
        seconds: [2, len(rows)].
        only: no other number of rows can be run: fewer cost what the cheapest size costs that holds them.
    """

    def __init__(
        self, rows: Sequence[int], contexts: tuple[int, int], seconds: Sequence[Sequence[float]], *, only: bool = False
    ):
        self._rows, self._contexts, self._only = list(rows), contexts, only
        self._seconds = np.asarray(seconds, dtype=float)
        if not only:
            self._seconds = np.maximum.accumulate(self._seconds, axis=1)  # noise is no discount

    @property
    def longest(self) -> int:
        """The longest context that was measured."""
        return self._contexts[1]

    def size(self, rows: int, context: int) -> int:
        """The cheapest of the measured sizes that hold `rows` rows; the largest where none does."""
        fit = [index for index, size in enumerate(self._rows) if size >= rows] or [len(self._rows) - 1]
        return self._rows[min(fit, key=lambda index: self._at(context)[index])]

    def upto(self, rows: int, context: int) -> NDArray[np.float64]:
        """Seconds for 1, 2, ..., `rows` rows behind `context` tokens."""
        at = self._at(context)
        wanted = np.arange(1, rows + 1)
        if self._only:
            cheapest = np.minimum.accumulate(at[::-1])[::-1]
            cheapest[0] = at[0]  # of one row: the step that does not speculate, whatever else would do
            return np.append(cheapest, np.inf)[np.searchsorted(self._rows, wanted)]
        at = np.maximum.accumulate(at)
        inside = np.interp(wanted, self._rows, at)
        if len(self._rows) > 1:  # beyond the last one as between the last two
            slope = (at[-1] - at[-2]) / (self._rows[-1] - self._rows[-2])
            inside = np.where(wanted > self._rows[-1], at[-1] + slope * (wanted - self._rows[-1]), inside)
        return inside

    def _at(self, context: int) -> NDArray[np.float64]:
        short, long = self._contexts
        share = (context - short) / (long - short) if long > short else 1.0
        return np.maximum(self._seconds[0] + share * (self._seconds[1] - self._seconds[0]), 1e-9)


def measure_curve(
    run: Callable[[int, int], float], rows: Sequence[int], contexts: tuple[int, int], *, only: bool = False
) -> Curve:
    """The curve of a step that `run(rows, context)` runs and times, in seconds; medians of a few turns.

    Rows take turns, so that a machine which slows down does so for all of them.
    """
    run(rows[0], contexts[1])
    kept = [rows[0]]
    first = run(rows[0], contexts[1])
    for count in rows[1:]:  # the first run of a size may set things up: it is not counted
        kept.append(count)
        if run(count, contexts[1]) > TOO_DEAR * first:
            break
    turns = [[[run(count, context) for count in kept] for context in contexts] for _ in range(REPEATS)]
    return Curve(kept, contexts, np.median(np.asarray(turns), axis=0), only=only)


def measure_drafting(run: Callable[[int, int], float]) -> NDArray[np.float64]:
    """Seconds of reading the newest tokens, of a level, and of each of its rows.

    Args:
        run: `run(depth, nodes)` drafts a tree of so many levels of `nodes` nodes, the first of them without a row of
            its own, and times it in seconds.
    """
    trees = ((1, 4), (4, 4), (4, 16))
    run(*trees[-1])
    seconds = np.median([[run(*tree) for tree in trees] for _ in range(REPEATS)], axis=0)
    samples = np.array([[1, depth - 1, (depth - 1) * nodes] for depth, nodes in trees])
    return np.maximum(np.linalg.solve(samples, seconds), 1e-7)


class Costs:
    """Seconds of everything in a round.

    Args:
        verify: the target's verification, by slots.
        draft: seconds of reading the newest tokens, of a level, and of each of its rows.
    """

    def __init__(self, verify: Curve, draft: NDArray[np.float64]):
        self.verify_curve, self._measured = verify, draft
        self._ratios: deque[float] = deque(maxlen=RECENT)
        self._unread: deque[tuple[float, int, int]] = deque(maxlen=RECENT)  # what no ratio was made of yet
        self._rest: dict[bool, deque[float]] = {True: deque(maxlen=RECENT), False: deque(maxlen=RECENT)}
        self._refresh: deque[float] = deque(maxlen=RECENT)
        # seconds of drafting = reading + level x levels, a row counted as a part of a level, by least squares that
        # forget what is long ago and fall back on what was measured
        self._normal, self._moment = np.zeros((2, 2)), np.zeros(2)

    def verify(self, slots: int, context: int) -> NDArray[np.float64]:
        """Seconds for verifying 1, 2, ..., `slots` slots."""
        return self._correction * self.verify_curve.upto(slots, context)

    def size(self, slots: int, context: int) -> int:
        """The cheapest verification that was measured and holds so many slots."""
        return self.verify_curve.size(slots, context)

    def plain(self, context: int) -> float:
        """Seconds of a round that does not speculate."""
        return float(self.verify(1, context)[0]) + _median(self._rest[False])

    def draft(self, levels: int, rows: int) -> float:
        """Seconds of drafting `levels` levels with `rows` rows together, the root's not counted."""
        return float(max(self._weights @ self._sample(levels, rows), 0.0))

    @property
    def level(self) -> float:
        """Seconds of one more level, its rows not counted."""
        return float(max(self._weights[1], 0.0))

    @property
    def row(self) -> float:
        """Seconds of one more row of a level."""
        return self.level * self._row_share

    def rest(self, speculates: bool) -> float:
        """Seconds of what is neither drafting, verification nor refresh."""
        return _median(self._rest[speculates] or self._rest[not speculates])

    @property
    def refresh(self) -> float:
        """Seconds of one refresh of the draft's working cache."""
        return _median(self._refresh)

    def learn(self, seconds: dict[str, float], passes: Sequence[int] | None, *, slots: int, context: int) -> None:
        """Correct by what a round took.

        Args:
            seconds: by stage, as in `Round.seconds`.
            passes: rows of each level drafted; None: it did not speculate.
            slots: verified.
        """
        self._unread.append((seconds["verify"], slots, context))
        rest = seconds.get("accept", 0.0) + max(seconds.get("host", 0.0), 0.0)
        if passes is None:
            self._rest[False].append(rest + seconds["draft"])
            return
        if "retrieve" in seconds:
            self._refresh.append(seconds["retrieve"])
        self._rest[True].append(rest)
        sample = self._sample(len(passes), sum(passes))
        took = min(seconds["draft"], 4 * float(self._weights @ sample))  # an interrupted round is no measure
        self._normal = FORGETS * self._normal + np.outer(sample, sample)
        self._moment = FORGETS * self._moment + sample * took

    @property
    def _correction(self) -> float:
        while self._unread:
            took, slots, context = self._unread.popleft()
            self._ratios.append(took / float(self.verify_curve.upto(slots, context)[-1]))
        return _median(self._ratios) or 1.0

    @property
    def _weights(self) -> NDArray[np.float64]:
        return np.linalg.solve(self._normal + TRUST, self._moment + TRUST @ self._measured[:2])

    @property
    def _row_share(self) -> float:
        return float(self._measured[2] / self._measured[1])

    def _sample(self, levels: int, rows: int) -> NDArray[np.float64]:
        return np.array([1.0, levels + rows * self._row_share])


def _median(values: Iterable[float]) -> float:
    """0 while nothing is known."""
    return median(values) if values else 0.0
