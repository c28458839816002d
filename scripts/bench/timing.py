"""Milliseconds of a step on any device, alone or beside others; steps as graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

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


def in_turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each run by the clock; they take turns, and who is first changes. No warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats):
        names = list(runs)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(elapsed_ms(runs[name], torch.device("cpu")))
    return times


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """`step` as a CUDA graph's replay, after one call of it."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
