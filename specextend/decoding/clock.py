"""The one clock of decoding: seconds per stage, taken by marks in the device's queue."""

from __future__ import annotations

import time

import torch


class StageClock:
    """Times stages that follow each other, without making the host wait: on a GPU by events, else by the host's clock.

    `start`, then after each stage `mark` its name, then `seconds`; used again for the next round.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self.start()

    def start(self) -> None:
        """A new round begins."""
        self._began = time.perf_counter()
        self._names: list[str] = []
        self._marks: list[object] = [self._mark(0)]

    def mark(self, name: str) -> None:
        """What ran since the last mark was stage `name`."""
        self._names.append(name)
        self._marks.append(self._mark(len(self._marks)))

    def stage_seconds(self) -> dict[str, float]:
        """By stage; waits for the last mark."""
        if self._on_gpu:
            self._marks[-1].synchronize()
        pairs = zip(self._names, self._marks, self._marks[1:], strict=False)
        return {name: self._between(start, end) for name, start, end in pairs}

    def seconds(self) -> dict[str, float]:
        """By stage; "host" is what none of them accounts for. The caller has waited for the device."""
        passed = time.perf_counter() - self._began
        seconds = self.stage_seconds()
        return seconds | {"host": max(0.0, passed - sum(seconds.values()))}

    def _mark(self, index: int):
        if not self._on_gpu:
            return time.perf_counter()
        if index == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[index].record()
        return self._events[index]

    def _between(self, start, end) -> float:
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
