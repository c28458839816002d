"""A prompt block by block: blocks bound the memory of a prefill, and between them it can be ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

OnBlock = Callable[[int], None]


def blocks(start: int, end: int, size: int | None, on_block: OnBlock | None = None) -> Iterator[slice]:
    """Places `start` .. `end` - 1 of a prompt, `size` at once; None: all at once.

    Args:
        on_block: told before each block where it begins, so how much is done; what it raises ends the reading.
    """
    for first in range(start, end, size or max(end, 1)):
        if on_block is not None:
            on_block(first)
        yield slice(first, min(first + size, end) if size else end)
