"""What the steps of a round cost: measured where they run, corrected by the rounds' own clocks."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from statistics import median

import numpy as np
from numpy.typing import NDArray

REPEATS = 3
SHORT = 256  # tokens of the shorter context that verifications are timed at
LONGER = 1.5  # times the longest context that was timed: beyond it they are timed anew
TOO_DEAR = 5.0  # verifications that cost so many times that of one token are not measured: no tree is worth them
RECENT = 9  # rounds whose clocks are remembered
FORGETS = 0.95  # weight of the last round's clocks when the next ones are known
TRUST_IN_DRAFT = 1.0, 16.0  # squares of samples that the measured seconds of reading and of a level stand for
TRUST_IN_CURVE = 0.2, 1.5  # rounds that the curve stands for, and that its step to trees does
JUMP = 1.5  # times what was expected: an interrupted verification counts as no more than that


class Curve:
    """Seconds of a step, by rows and by context: between measured rows a line, and one through the two contexts.

    Args:
        rows: measured, ascending; contexts: shorter and longer one, tokens.
        seconds: [2, len(rows)].
        only: no other number of rows can be run: sizes are steps, and fewer rows cost what the cheapest size costs that
            holds them.
    """

    def __init__(
        self, rows: Sequence[int], contexts: tuple[int, int], seconds: Sequence[Sequence[float]], *, only: bool = False
    ):
        self._rows, self._contexts, self.only = list(rows), contexts, only
        short, long = ([float(one) for one in each] for each in seconds)
        self._seconds = (short, long) if only else (_rising(short), _rising(long))  # noise is no discount
        self._asked: tuple[int, list[float]] = -1, []  # what is usable at the context that was asked for last

    @property
    def longest(self) -> int:
        """The longest context that was measured."""
        return self._contexts[1]

    def size(self, rows: int, context: int) -> int:
        """The cheapest of the measured sizes that hold `rows` rows; the largest where none does."""
        at = self._at(context)
        fit = [index for index, size in enumerate(self._rows) if size >= rows] or [len(self._rows) - 1]
        return self._rows[min(fit, key=at.__getitem__)]

    def at(self, rows: int, context: int) -> float:
        """Seconds for `rows` rows behind `context` tokens."""
        return self._between(rows, self._usable(context))

    def upto(self, rows: int, context: int) -> NDArray[np.float64]:
        """Seconds for 1, 2, ..., `rows` rows behind `context` tokens."""
        usable = self._usable(context)
        return np.array([self._between(count, usable) for count in range(1, rows + 1)])

    def _between(self, rows: int, usable: list[float]) -> float:
        known = self._rows
        index = bisect_left(known, rows)
        if self.only:
            return usable[index] if index < len(known) else float("inf")
        if rows <= known[0] or len(known) == 1:
            return usable[0]
        index = min(index, len(known) - 1)  # beyond the last one as between the last two
        slope = (usable[index] - usable[index - 1]) / (known[index] - known[index - 1])
        return usable[index] + slope * (rows - known[index])

    def _usable(self, context: int) -> list[float]:
        """Seconds by measured rows: of the cheapest size that holds them, or never less than of fewer."""
        if self._asked[0] != context:
            at = self._at(context)
            # of one row: the step that does not speculate, whatever else would do
            usable = [at[0], *list(accumulate(reversed(at), min))[-2::-1]] if self.only else _rising(at)
            self._asked = context, usable
        return self._asked[1]

    def _at(self, context: int) -> list[float]:
        (short, long), share = self._contexts, 1.0
        if long > short:
            share = (context - short) / (long - short)
        return [max(a + share * (b - a), 1e-9) for a, b in zip(*self._seconds, strict=True)]


def measure_curve(
    run: Callable[[int, int], float], rows: Sequence[int], contexts: tuple[int, int], *, only: bool = False
) -> Curve:
    """The curve of a step that `run(rows, context)` runs and times, in seconds; the best of a few turns.

    What disturbs a machine makes steps slower, never faster. Rows take turns, so that it does so for all of them.
    """
    run(rows[0], contexts[1])
    kept = [rows[0]]
    first = run(rows[0], contexts[1])
    for count in rows[1:]:  # the first run of a size may set things up: it is not counted
        kept.append(count)
        if run(count, contexts[1]) > TOO_DEAR * first:
            break
    turns = [[[run(count, context) for count in kept] for context in contexts] for _ in range(REPEATS)]
    return Curve(kept, contexts, np.min(np.asarray(turns), axis=0), only=only)


def measure_drafting(run: Callable[[int, int], float]) -> NDArray[np.float64]:
    """Seconds of reading the newest tokens, of a level, and of each of its rows.

    Args:
        run: `run(depth, nodes)` drafts a tree of so many levels of `nodes` nodes, the first of them without a row of
            its own, and times it in seconds.
    """
    trees = ((1, 4), (4, 4), (4, 16))
    run(*trees[-1])
    seconds = np.min([[run(*tree) for tree in trees] for _ in range(REPEATS)], axis=0)
    samples = np.array([[1, depth - 1, (depth - 1) * nodes] for depth, nodes in trees])
    return np.maximum(np.linalg.solve(samples, seconds), 1e-7)


class TwoWeights:
    """y = w0 x0 + w1 x1 by least squares that forget what is long ago, and fall back on what is believed anyway.

    Args:
        believed: both weights; trust: squares of samples that stand for each.
    """

    def __init__(self, believed: Sequence[float], trust: Sequence[float]):
        (first, second), (a, b) = believed, trust
        self._trust = a, b, a * first, b * second
        self._sums = 0.0, 0.0, 0.0, 0.0, 0.0
        self._solve()

    def learn(self, x0: float, x1: float, y: float) -> None:
        new = x0 * x0, x0 * x1, x1 * x1, x0 * y, x1 * y
        self._sums = tuple(FORGETS * old + one for old, one in zip(self._sums, new, strict=True))
        self._solve()

    def _solve(self) -> None:
        a, b, d, first, second = self._sums
        more_a, more_d, more_first, more_second = self._trust
        a, d, first, second = a + more_a, d + more_d, first + more_first, second + more_second
        scale = 1 / (a * d - b * b)
        self.first, self.second = scale * (d * first - b * second), scale * (a * second - b * first)


class Costs:
    """Seconds of everything in a round.

    Args:
        verify: the target's verification, by slots.
        draft: seconds of reading the newest tokens, of a level, and of each of its rows.
    """

    def __init__(self, verify: Curve, draft: NDArray[np.float64]):
        self.verify_curve, self._measured = verify, draft
        # seconds of a verification = speed x curve, and a share more where it is of a tree
        self._correction = TwoWeights((1.0, 0.0), TRUST_IN_CURVE)
        # seconds of drafting = reading + level x levels, a row counted as a part of a level
        self._drafting = TwoWeights(draft[:2], TRUST_IN_DRAFT)
        self._row_share = float(draft[2] / draft[1])
        self._rest: dict[bool, deque[float]] = {True: deque(maxlen=RECENT), False: deque(maxlen=RECENT)}
        self._refresh: deque[float] = deque(maxlen=RECENT)

    def verify(self, slots: int, context: int) -> NDArray[np.float64]:
        """Seconds for verifying 1, 2, ..., `slots` slots."""
        seconds = self.verify_curve.upto(slots, context) * (self._correction.first + self._correction.second)
        seconds[0] = self.verifying(1, context)
        return seconds

    def cheapest_slot(self, verify: NDArray[np.float64]) -> float:
        """Seconds of one more slot where it costs least, of `verify` slots; nothing where sizes are steps."""
        if self.verify_curve.only:
            return 0.0
        return max(float(np.min((verify[1:] - verify[0]) / np.arange(1, len(verify)))), 0.0)

    def verifying(self, slots: int, context: int) -> float:
        """Seconds for verifying `slots` slots."""
        times = self._correction.first + (self._correction.second if slots > 1 else 0.0)
        return self.verify_curve.at(slots, context) * times

    def size(self, slots: int, context: int) -> int:
        """The cheapest verification that was measured and holds so many slots."""
        return self.verify_curve.size(slots, context)

    def plain(self, context: int) -> float:
        """Seconds of a round that does not speculate."""
        return self.verifying(1, context) + _median(self._rest[False])

    def draft(self, levels: int, rows: int) -> float:
        """Seconds of drafting `levels` levels with `rows` rows together, the root's not counted."""
        return max(self._drafting.first + self._drafting.second * self._levels(levels, rows), 0.0)

    @property
    def level(self) -> float:
        """Seconds of one more level, its rows not counted."""
        return max(self._drafting.second, 0.0)

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
        self._learn_verification(seconds["verify"], slots, context)
        rest = seconds.get("accept", 0.0) + max(seconds.get("host", 0.0), 0.0)
        if passes is None:
            self._rest[False].append(rest + seconds["draft"])
            return
        if "retrieve" in seconds:
            self._refresh.append(seconds["retrieve"])
        self._rest[True].append(rest)
        levels, rows = len(passes), sum(passes)
        took = min(seconds["draft"], 4 * self.draft(levels, rows))  # an interrupted round is no measure
        self._drafting.learn(1.0, self._levels(levels, rows), took)

    def _learn_verification(self, took: float, slots: int, context: int) -> None:
        expected = self.verifying(slots, context)
        took = min(max(took, expected / JUMP), expected * JUMP)
        self._correction.learn(1.0, float(slots > 1), took / self.verify_curve.at(slots, context))

    def _levels(self, levels: int, rows: int) -> float:
        return levels + rows * self._row_share


def _rising(values: Iterable[float]) -> list[float]:
    """Each value, and never less than the one before."""
    return list(accumulate(values, max))


def _median(values: Iterable[float]) -> float:
    """0 while nothing is known."""
    return median(values) if values else 0.0
