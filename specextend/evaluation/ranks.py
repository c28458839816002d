"""An evaluation on several ranks: rank 0 says what to measure, the others follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist

from specextend.evaluation.plan import Plan, Task
from specextend.evaluation.records import SampleRecord
from specextend.evaluation.workers import Engines, Failure, LocalWorker, Unwatched, Watch


class Leader(LocalWorker):
    """Rank 0 of an evaluation: `Workers` that has the other ranks measure what it measures; a context manager."""

    def __enter__(self) -> Leader:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:  # otherwise the others may be gone, and torchrun ends them
            _tell(None)

    def measure(self, plan: Plan, tasks: Sequence[Task], watch: Watch) -> Iterator[tuple[Task, SampleRecord | Failure]]:
        for task in tasks:
            _tell((plan.without_prompts(), task))
            yield from super().measure(plan, [task], watch)


def follow(engines: Engines) -> None:
    """Any other rank of an evaluation: measure what rank 0 says until it says no more; nothing is written."""
    worker = LocalWorker(engines)
    while (order := _tell(None)) is not None:
        plan, task = order
        list(worker.measure(plan, [task], Unwatched()))


def _tell(message: object) -> Any:
    """What rank 0 says, on every rank."""
    said = [message]
    dist.broadcast_object_list(said, src=0)
    return said[0]
