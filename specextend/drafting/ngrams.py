"""Where the newest tokens stood before, and what followed them there."""

from __future__ import annotations

from functools import reduce
from operator import and_

import torch
from torch import Tensor

LONGEST_NGRAM = 3


def continuation(context: Tensor, length: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What followed the latest earlier place of the newest 3 tokens, else of the newest 2, else of the newest.

    Every shape is known beforehand and `length` may lie on a GPU, so that a captured graph serves every length.

    Args:
        context: [S] token ids, anything beyond `length` [].
        count: tokens wanted.
    Returns:
        tokens [count] and which of them exist, bool: those that do not come last.
    """
    index = torch.arange(len(context), device=context.device)
    after = torch.zeros_like(length)  # 0: no place found, since an n-gram stands before what follows it
    for size in range(1, LONGEST_NGRAM + 1):
        newest = (length - size + torch.arange(size, device=context.device)).clamp(min=0)
        equal = (
            context.roll(-offset) == context.index_select(0, newest[offset : offset + 1]) for offset in range(size)
        )
        found = torch.where(reduce(and_, equal) & (index + size < length), index, -1).amax()
        after = torch.where(found >= 0, found + size, after)
    at = after + torch.arange(count, device=context.device)
    return context[at.clamp(max=len(context) - 1)], (after > 0) & (at < length)
