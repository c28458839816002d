"""What an answer is worth: whether it is right, where a solution is known, and whether it only repeats itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_right(text: str, answer: str) -> bool:
    """Whether the answer that `text` ends on is `answer`: the last \\boxed{...}, else the last number."""
    claimed = claimed_answer(text)
    return claimed is not None and _plain(claimed) == _plain(answer)


def claimed_answer(text: str) -> str | None:
    """The content of the last complete \\boxed{...}; without one, the last number; None where there is neither."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        begin = start + len(r"\boxed{")
        depth = 1
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return text[begin:end]
        start = text.rfind(r"\boxed{", 0, start)  # cut off before it was closed
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def _plain(answer: str) -> str:
    """Without dollar signs, spaces and thousands' commas; leading zeros as AIME writes them do not count."""
    bare = re.sub(r"[\s$,]", "", answer)
    return str(int(bare)) if re.fullmatch(r"-?\d+", bare) else bare


def loops(token_ids: Sequence[int]) -> bool:
    """Whether it ends in a loop: its last 64 tokens repeat 32 or fewer, which stand there three times at least."""
    return ends_in_loop(np.asarray(token_ids), tail=64, max_period=32)


def ends_in_loop(tokens: np.ndarray, tail: int = 64, max_period: int = 64) -> bool:
    """Do the last `tail` tokens of `tokens` [N] repeat what stands some period <= `max_period` before them?"""
    longest = min(max_period, len(tokens) - tail)
    return any(np.array_equal(tokens[-tail:], tokens[-tail - p : -p]) for p in range(1, longest + 1))


def distinct_share(token_ids: Sequence[int], order: int = 4) -> float:
    """Share of an answer's `order`-grams that stand in it for the first time; 1 where it has none."""
    return 1.0 if len(token_ids) < order else 1 - repeated_share(np.asarray(token_ids), order)


def repeated_share(tokens: np.ndarray, order: int = 4) -> float:
    """Share of the `order`-grams of `tokens` [N] that occurred in it before."""
    grams = np.lib.stride_tricks.sliding_window_view(tokens, order)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)
