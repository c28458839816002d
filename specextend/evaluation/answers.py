"""Answers to problems with a known solution: what a model's text claims, and whether that is right."""

from __future__ import annotations

import re

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
