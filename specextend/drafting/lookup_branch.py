"""A branch that costs no draft: what followed the newest tokens where they stood before, joined to the model's tree.

On text that quotes its input, or repeats itself, it is the best draft there is; elsewhere nobody expects anything of
it, and it is left out. What is expected follows from the length of the match alone, and is learned prompt by prompt:
every token of the text is one sample, whether or not the branch was verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specextend.drafting.ngrams import LONGEST_NGRAM

LONGEST_MATCH = 16  # tokens; a longer match promises no more
PLACES = 4  # earlier places of the newest n-gram of which the longest match is taken
HALF_LIFE = 256  # tokens after which a sample counts half
PRIOR_SAMPLES = 3.0
PRIOR = np.interp(np.arange(LONGEST_MATCH + 1), (0, 1, 2, 3, 6, 10, 16), (0.0, 0.1, 0.3, 0.45, 0.65, 0.8, 0.9))
LEAST = 0.02  # probability of the first token below which there is no branch


@dataclass(frozen=True)
class Branch:
    """A path below the newest token.

    Attributes:
        tokens: [m]; reach: [m] log-probability that the target accepts them.
    """

    tokens: Sequence[int] = ()
    reach: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))


class NoBranch:
    """Where no branch is wanted."""

    def begin(self, context: Sequence[int]) -> None:
        pass

    def extend(self, tokens: Sequence[int]) -> None:
        pass

    def look(self) -> Branch:
        return Branch()


class LookupBranch(NoBranch):
    """The branch of a text as it grows.

    Args:
        length: tokens of a branch at most.
    """

    def __init__(self, length: int):
        self._length = length
        self.begin(())

    def begin(self, context: Sequence[int]) -> None:
        """A new text, the newest token last."""
        text = self._text = list(context)
        # by n-gram the place after its last one; by place that of the longest n-gram's one before
        self._last: list[dict[tuple[int, ...], int]] = []
        self._before: dict[int, int] = {}
        for size in range(1, LONGEST_NGRAM + 1):
            places: dict[tuple[int, ...], int] = {}
            for after, ngram in enumerate(zip(*(text[start:-1] for start in range(size)), strict=False), size):
                if size == LONGEST_NGRAM and ngram in places:
                    self._before[after] = places[ngram]
                places[ngram] = after
            self._last.append(places)
        self._offered, self._hits = (np.zeros(LONGEST_MATCH + 1) for _ in range(2))
        self._find()

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on with the target's own `tokens`, and see for each of them whether the branch had it."""
        for token in tokens:
            if self._match:
                self._offered *= 0.5 ** (1 / HALF_LIFE)
                self._hits *= 0.5 ** (1 / HALF_LIFE)
                self._offered[self._match] += 1
                self._hits[self._match] += self._text[self._after] == token
            self._append(token)
            self._find()

    def look(self) -> Branch:
        """What followed the longest earlier match of the newest tokens; nothing where that promises nothing."""
        if not self._match:
            return Branch()
        matches = np.minimum(self._match + np.arange(self._length), LONGEST_MATCH)
        reach = np.cumsum(np.log(self._expected()[matches]))
        if reach[0] < np.log(LEAST):
            return Branch()
        period = len(self._text) - self._after  # a text that repeats itself goes on as it did
        return Branch([self._text[self._after + index % period] for index in range(self._length)], reach)

    def _expected(self) -> NDArray[np.float64]:
        """Probability [LONGEST_MATCH + 1] that the next token is the one that followed, by the length of the match."""
        # neighbours lend each other what they have seen, so that a length never seen is not left to the prior
        hits, offered = (np.convolve(one, (0.5, 1.0, 0.5), "same") for one in (self._hits, self._offered))
        hits, offered = hits + PRIOR_SAMPLES * PRIOR, offered + PRIOR_SAMPLES
        return np.clip(hits / offered, 1e-4, 0.995)

    def _append(self, token: int) -> None:
        text = self._text
        for size, places in enumerate(self._last, 1):  # the newest n-gram, now that something follows it
            if len(text) >= size:
                ngram = tuple(text[-size:])
                if size == LONGEST_NGRAM and ngram in places:
                    self._before[len(text)] = places[ngram]
                places[ngram] = len(text)
        text.append(token)

    def _find(self) -> None:
        """The place after the longest earlier match, and the match's length, 0 for none."""
        self._after = self._match = 0
        text = self._text
        for size in range(LONGEST_NGRAM, 0, -1):
            after = self._last[size - 1].get(tuple(text[-size:])) if len(text) >= size else None
            if after is None:
                continue
            for _ in range(PLACES):
                match = self._length_of(after, size)
                if match > self._match:
                    self._after, self._match = after, match
                after = self._before.get(after) if size == LONGEST_NGRAM else None
                if after is None or self._match == LONGEST_MATCH:
                    break
            return

    def _length_of(self, after: int, known: int) -> int:
        text, end, most = self._text, len(self._text), min(LONGEST_MATCH, after)
        length = known
        while length < most and text[after - 1 - length] == text[end - 1 - length]:
            length += 1
        return length
