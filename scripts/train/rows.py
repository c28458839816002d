"""Training rows: random stretches of the token stream, with something planted in them.

Far repeats teach both models to quote (copying over distance), planted facts to look up, and near repeats, marked for
unlikelihood, to leave a loop again. Rows are built with numpy on the CPU: about a millisecond for a step of sixty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from scripts.train.facts import Fact

PLAIN, SILENT, LOOPED = 0, 1, 2  # what a token's loss is: cross-entropy, none, unlikelihood
UNIT = 2048  # tokens; longer rows get proportionally more plants


@dataclass(frozen=True)
class Mix:
    """How often and how a row is changed; lengths and distances in tokens."""

    copy_rows: float = 0.5
    fact_rows: float = 0.2
    loop_rows: float = 0.1
    max_copies: int = 4
    max_facts: int = 5
    copy_span: tuple[int, int] = (24, 200)
    min_distance: int = 256
    loop_period: tuple[int, int] = (6, 160)
    loop_repeats: int = 3  # at most
    loop_grace: int = 8  # looped tokens without any loss before the unlikelihood sets in

    def scaled_to(self, length: int) -> "Mix":
        """The same mix for rows shorter than 1,024 tokens (tests): spans and distances shrink with them."""
        if length >= 1024:
            return self
        shrink = length / 1024
        span = tuple(max(4, int(n * shrink)) for n in self.copy_span)
        period = (self.loop_period[0], max(self.loop_period[0] + 1, int(self.loop_period[1] * shrink)))
        distance = max(span[1], int(self.min_distance * shrink))
        return replace(self, copy_span=span, min_distance=distance, loop_period=period)


# For drafts, which follow whatever the target writes: greedy text of small models repeats itself a lot.
REPETITIVE = Mix(copy_rows=0.6, loop_rows=0.3, loop_repeats=12)


@dataclass(frozen=True)
class Plant:
    """What was planted where: tokens from `start` on repeat (or recall) what stands at `source`."""

    source: int
    start: int
    length: int


class Row:
    """One row under construction; `taken` guards what was planted, so that plants never overwrite each other."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens.astype(np.int64)  # [length]
        self.kinds = np.zeros(len(tokens), dtype=np.uint8)  # [length]
        self.taken = np.zeros(len(tokens), dtype=bool)  # [length]

    def plant_copy(self, rng: np.random.Generator, mix: Mix) -> Plant | None:
        """Repeat a span at a log-uniform distance; None when there is no room."""
        length = int(rng.integers(mix.copy_span[0], mix.copy_span[1] + 1))
        distance = _log_uniform(rng, mix.min_distance, len(self.tokens) - length)
        if distance is None:
            return None
        start = int(rng.integers(distance, len(self.tokens) - length + 1))
        source = start - distance
        if self._is_taken(source, length) or self._is_taken(start, length):
            return None
        self._write(start, self.tokens[source : source + length])
        self.taken[source : source + length] = True
        return Plant(source, start, length)

    def plant_fact(self, rng: np.random.Generator, fact: Fact) -> Plant | None:
        """State a fact, recall it at a log-uniform distance; None when there is no room."""
        length, needed = len(fact.recall), len(fact.statement)
        distance = _log_uniform(rng, needed, len(self.tokens) - length)
        if distance is None:
            return None
        start = int(rng.integers(distance, len(self.tokens) - length + 1))
        source = start - distance
        if self._is_taken(source, needed) or self._is_taken(start, length):
            return None
        self._write(source, fact.statement)
        self._write(start, fact.recall)
        return Plant(source, start, length)

    def plant_loop(self, rng: np.random.Generator, mix: Mix) -> Plant | None:
        """Insert one to `loop_repeats` repeats of the last `period` tokens; the text then goes on where it was.

        ... a b c | a b c a b | d e ...      period 3, length 5
                   . . . . .                  the first `loop_grace` SILENT, the others LOOPED
        """
        period = _log_uniform(rng, *mix.loop_period)
        length = int(rng.integers(period, mix.loop_repeats * period + 1))
        length = min(length, len(self.tokens) - period - 1)
        if length < 1:
            return None
        start = int(rng.integers(period, len(self.tokens) - length))
        if self._is_taken(start - period, period + 1):
            return None
        for array in (self.tokens, self.kinds, self.taken):
            array[start + length :] = array[start:-length].copy()
        self._write(start, self.tokens[start - period + np.arange(length) % period])
        self.taken[start - period : start] = True
        self.kinds[start : start + length] = LOOPED
        self.kinds[start : start + min(mix.loop_grace, length)] = SILENT
        return Plant(start - period, start, length)

    def _is_taken(self, start: int, length: int) -> bool:
        return bool(self.taken[start : start + length].any())

    def _write(self, start: int, tokens: np.ndarray) -> None:
        self.tokens[start : start + len(tokens)] = tokens
        self.taken[start : start + len(tokens)] = True


class RowSource:
    """Draws rows from a token stream, [N] uint16, and plants according to a mix."""

    def __init__(self, stream: np.ndarray, facts: Sequence[Fact], mix: Mix, seed: int) -> None:
        self.stream, self.facts, self.mix = stream, facts, mix
        self.rng = np.random.default_rng(seed)

    def draw(self, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [count, length] int64 and what each token's loss is, [count, length] uint8."""
        starts = self.rng.integers(0, len(self.stream) - length + 1, size=count)
        mix = self.mix.scaled_to(length)
        rows = [self._planted(Row(self.stream[start : start + length]), mix) for start in starts]
        return np.stack([row.tokens for row in rows]), np.stack([row.kinds for row in rows])

    def _planted(self, row: Row, mix: Mix) -> Row:
        rng, units = self.rng, max(1, len(row.tokens) // UNIT)
        if rng.random() < mix.loop_rows:  # first, as it shifts the rest of the row
            for _ in range(units):
                row.plant_loop(rng, mix)
        if rng.random() < mix.copy_rows:
            for _ in range(units * int(rng.integers(1, mix.max_copies + 1))):
                row.plant_copy(rng, mix)
        if rng.random() < mix.fact_rows:
            for _ in range(units * int(rng.integers(2, mix.max_facts + 1))):
                row.plant_fact(rng, self.facts[rng.integers(len(self.facts))])
        return row


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int | None:
    """A whole number between low and high, both included, its logarithm uniform; None when there is none."""
    if high < low:
        return None
    return min(high, int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))))
