"""Requests to the L2 cache for what a later launch will read; nobody waits for them (Triton).

A kernel that takes such a tensor starts some programs more, before its own, which only ask and end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LINE = 1024  # bytes per request
LANES = 128  # requests per program


def can_fetch(device: torch.device) -> bool:
    """Whether the device knows bulk requests to its L2 cache (compute capability 9.0)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def programs_for(ahead: Tensor | None) -> int:
    """Programs that ask for `ahead`; its odd end is left to whoever reads it."""
    return 0 if ahead is None else ahead.nbytes // (LINE * LANES)


@triton.jit
def request(ahead, program, LINE: tl.constexpr, LANES: tl.constexpr):
    """Ask for the program's share of `ahead`."""
    line = program.to(tl.int64) * LANES + tl.arange(0, LANES)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 1024; mov.u32 $0, 0;", "=r,l",
        [ahead.to(tl.int64, bitcast=True) + line * LINE], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
