"""Milliseconds of a step, on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def elapsed_ms(step: Callable[[], object], device: torch.device) -> float:
    """One call: by the device's own events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@torch.inference_mode()
def median_ms(
    step: Callable[[], object], device: torch.device, *, before: Callable[[], object] = lambda: None,
    repeats: int = 20, warm_up: int = 3,
) -> float:  # fmt: skip
    """Median of `repeats` calls after `warm_up` that do not count; `before` runs before each, off the clock."""
    times = []
    for _ in range(warm_up + repeats):
        before()
        times.append(elapsed_ms(step, device))
    return statistics.median(times[warm_up:])
