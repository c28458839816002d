"""Launches that begin while the one before them ends (programmatic dependent launch, compute capability 9 and later).

A round is some three hundred short launches in a row, and each would lose microseconds to filling and draining the
machine. A chained launch starts as soon as every program of its predecessor has started; until it has called `join` it
may only ask for memory that no launch writes, such as weights. Outside of Hopper, and in Triton's interpreter, launches
follow each other as usual.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LINE = tl.constexpr(64)  # half-precision numbers per line of the L2 cache


@cache
def options(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel with a constant CHAINED that calls `join`."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        return {"CHAINED": True, "launch_pdl": True}
    return {"CHAINED": False}


@triton.jit
def join(CHAINED: tl.constexpr):
    """Let the next launch begin, and wait until all earlier ones have written what they write."""
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def ask(pointers):
    """Ask for the lines at `pointers` to come into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
