"""A branch that costs no draft: what followed the newest tokens where they stood before, joined to the model's tree.

On text that quotes its input, or repeats itself, it is the best draft there is; elsewhere nobody expects anything of
it, and it is left out. What is expected follows from the length of the match alone, and is learned prompt by prompt:
every token of the text is one sample, whether or not the branch was verified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specextend.drafting.ngrams import LONGEST_NGRAM

LONGEST_MATCH = 16  # tokens; a longer match promises no more
PLACES = 4  # earlier places of the newest n-gram of which the longest match is taken
GROWTH = 2 ** (1 / 256)  # of a sample's weight from token to token: half of it is left after 256
PRIOR_SAMPLES = 2.0
PRIOR = np.interp(np.arange(LONGEST_MATCH + 1), (0, 1, 2, 3, 6, 10, 16), (0.0, 0.1, 0.2, 0.3, 0.5, 0.65, 0.8)).tolist()
LEAST, LAST = 0.05, 0.01  # probability of the first token below which there is no branch, and of its end


@dataclass(frozen=True)
class Branch:
    """A path below the newest token.

    Attributes:
        tokens: [m]; reach: [m] log-probability that the target accepts them.
    """

    tokens: Sequence[int] = ()
    reach: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))


NOTHING = Branch()


class NoBranch:
    """Where no branch is wanted."""

    def begin(self, context: Sequence[int]) -> None:
        pass

    def extend(self, tokens: Sequence[int]) -> None:
        pass

    def look(self) -> Branch:
        return NOTHING


class LookupBranch(NoBranch):
    """The branch of a text as it grows.

    Args:
        length: tokens of a branch at most.
    """

    def __init__(self, length: int):
        self._length, self._text = length, []
        self.begin(())

    def begin(self, context: Sequence[int]) -> None:
        """A new text, the newest token last; what it shares with the beginning of the last one is known already."""
        known, self._text = self._text, list(context)
        shared = next(
            (at for at, (one, other) in enumerate(zip(known, self._text, strict=False)) if one != other), None
        )
        shared = min(len(known), len(self._text)) if shared is None else shared
        if 2 * shared > len(known):
            self._forget(known, shared)
        else:
            shared = 0
            self._forget_all()
        self._index(shared)
        # by length of the match; the weight of a sample grows instead of what all earlier ones shrinking
        self._offered, self._hits = ([0.0] * (LONGEST_MATCH + 2) for _ in range(2))
        self._weight = 1.0
        self._find()

    def _index(self, begin: int) -> None:
        """Know the n-grams before the places from `begin` on; what ends the text has no place after it yet."""
        text, end = self._text, len(self._text)
        for size, (places, before) in enumerate(self._indices, 1):
            first = min(max(begin, size), end)
            ngrams = zip(*(text[max(first - size, 0) + start : end] for start in range(size)), strict=False)
            for after, ngram in zip(range(first, end), ngrams, strict=False):
                if ngram in places:
                    before[after] = places[ngram]
                places[ngram] = after

    def _forget(self, text: Sequence[int], begin: int) -> None:
        """Undo what was learned of `text` from the place `begin` on."""
        for size, (places, before) in enumerate(self._indices, 1):
            for after in range(len(text) - 1, max(begin, size) - 1, -1):
                ngram = tuple(text[after - size : after])
                if after in before:
                    places[ngram] = before.pop(after)
                else:
                    del places[ngram]

    def _forget_all(self) -> None:
        # for each size of n-grams: by n-gram the place after its last one; by place that of the same one before
        self._indices: list[tuple[dict[tuple[int, ...], int], dict[int, int]]]
        self._indices = [({}, {}) for _ in range(LONGEST_NGRAM)]

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on with the target's own `tokens`, and see for each of them whether the branch had it."""
        if self._weight > 1e100:
            self._offered, self._hits = ([one / self._weight for one in of] for of in (self._offered, self._hits))
            self._weight = 1.0
        for token in tokens:
            if self._match:
                self._weight *= GROWTH
                self._offered[self._match] += self._weight
                self._hits[self._match] += self._weight * (self._text[self._after] == token)
            self._text.append(token)
            self._index(len(self._text) - 1)
            self._find()

    def look(self) -> Branch:
        """What followed the longest earlier match of the newest tokens; nothing where that promises nothing."""
        reach, chance, match = [], 1.0, self._match
        while match and len(reach) < self._length:
            chance *= self._expected(match)
            if chance < (LAST if reach else LEAST):
                break
            reach.append(math.log(chance))
            match = min(match + 1, LONGEST_MATCH)
        if not reach:
            return NOTHING
        period = len(self._text) - self._after  # a text that repeats itself goes on as it did
        tokens = [self._text[self._after + index % period] for index in range(len(reach))]
        return Branch(tokens, np.array(reach))

    def _expected(self, match: int) -> float:
        """Probability that the next token is the one that followed, behind a match of so many tokens."""
        # neighbours lend what they have seen, so that a length never seen is not left to the prior
        hits, offered = self._hits, self._offered
        found = hits[match] + 0.5 * (hits[match - 1] + hits[match + 1])
        asked = offered[match] + 0.5 * (offered[match - 1] + offered[match + 1])
        prior = PRIOR_SAMPLES * self._weight
        return min(max((found + prior * PRIOR[match]) / (asked + prior), 1e-4), 0.995)

    def _find(self) -> None:
        """The place after the longest earlier match, and the match's length, 0 for none."""
        self._after = self._match = 0
        text = self._text
        for size in range(LONGEST_NGRAM, 0, -1):
            places, before = self._indices[size - 1]
            after = places.get(tuple(text[-size:])) if len(text) >= size else None
            if after is None:
                continue
            for _ in range(PLACES):
                match = self._length_of(after, size)
                if match > self._match:
                    self._after, self._match = after, match
                after = before.get(after) if size == LONGEST_NGRAM else None
                if after is None or self._match == LONGEST_MATCH:
                    break
            return

    def _length_of(self, after: int, known: int) -> int:
        text, end, most = self._text, len(self._text), min(LONGEST_MATCH, after)
        length = known
        while length < most and text[after - 1 - length] == text[end - 1 - length]:
            length += 1
        return length
