"""Who measures the tasks of an evaluation: this process, or (`ray_workers.py`) many.

`evaluate` says what is to be done and writes what comes back; workers yield each task with its record, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from specextend.data.prompts import Prompt, cut_to_fit
from specextend.evaluation.answers import is_right
from specextend.evaluation.environment import environment
from specextend.evaluation.plan import WARM_UP_NEW_TOKENS, Plan, Task, setting_of
from specextend.evaluation.records import SampleRecord, Timing, Worker, first_difference

if TYPE_CHECKING:
    from torch import Tensor

    from specextend.decoding.output import Generation
    from specextend.engine import SpecExtend

TRIES = 3  # for a generation that captures nothing
Engines = Callable[[str | None], "SpecExtend"]  # the engine of a method, by its name


@dataclass(frozen=True)
class Failure:
    """A task that was given up, and why, in a line."""

    reason: str


class Watch(Protocol):
    """Who is told what happens meanwhile."""

    def begin(self, task: Task, activity: str) -> None:
        """`activity` ("measuring") on `task` begins."""

    def note(self, line: str) -> None:
        """Something worth a line of its own."""


class Unwatched:
    """A `Watch` for those whom nobody watches."""

    def begin(self, task: Task, activity: str) -> None:
        pass

    def note(self, line: str) -> None:
        pass


class Workers(Protocol):
    """Those who measure."""

    @property
    def limit(self) -> int:
        """Prompt plus new tokens the target can hold."""

    def manifest(self, plan: Plan) -> dict[str, Any]:
        """`{"setting": ..., "environment": ...}` of what they will measure."""

    def measure(self, plan: Plan, tasks: Sequence[Task], watch: Watch) -> Iterator[tuple[Task, SampleRecord | Failure]]:
        """Each of `tasks` once, with its record, as they are done."""


class LocalWorker:
    """This process, one task after the other.

    Args:
        engines: gives the engine of a method; asked again only when the method changes.
        number, workers_on_host: as its records name it, see `Worker`.
    """

    def __init__(self, engines: Engines, *, number: int = 0, workers_on_host: int = 1):
        self._engines, self._place = engines, (number, workers_on_host)
        self._meter: Meter | None = None

    @property
    def limit(self) -> int:
        return self._engines(None).limit

    def manifest(self, plan: Plan) -> dict[str, Any]:
        return {"setting": setting_of(self._meter_of(plan).engine, plan), "environment": environment()}

    def measure(self, plan: Plan, tasks: Sequence[Task], watch: Watch) -> Iterator[tuple[Task, SampleRecord | Failure]]:
        meter = self._meter_of(plan)
        for task in tasks:
            if meter.is_cold(task):
                watch.begin(task, "warm-up before")
                meter.warm_up(task)
            watch.begin(task, "measuring")
            yield task, meter.measure(task)

    def _meter_of(self, plan: Plan) -> Meter:
        plan = plan.without_prompts()
        if self._meter is None or self._meter.plan != plan:
            engine = self._engines(plan.method)
            worker = Worker.here(*self._place, engine.models.device)
            self._meter = Meter(engine, plan, environment()["commit"], worker)
        return self._meter


@dataclass(frozen=True)
class Meter:
    """Measures method and baseline on one prompt after the other.

    Args:
        plan: without its prompts.
        commit: `environment()["commit"]` of this process.
    """

    engine: SpecExtend
    plan: Plan
    commit: dict[str, Any] | None
    worker: Worker
    _warm: set[str] = field(default_factory=set)

    def is_cold(self, task: Task) -> bool:
        """Whether nothing of the task's length was run yet."""
        return task.key[0] not in self._warm

    def warm_up(self, task: Task) -> None:
        """A short generation of either kind after the whole prompt, not measured.

        Kernels are loaded, threads started, and memory and graphs of this length are in place.
        """
        ids, _ = prompt_ids(self.engine, task.prompt, self.plan.max_new_tokens)
        new_tokens = min(WARM_UP_NEW_TOKENS, self.plan.max_new_tokens)
        for generate in (self.engine.autoregressive, self.engine.generate):
            generate(ids, new_tokens, sampling=self.plan.sampling)
        self._warm.add(task.key[0])

    def measure(self, task: Task) -> SampleRecord:
        """Exactly one generation by the method and one autoregressively, of the same prompt with the same seed."""
        bucket, sample, run = task.key
        ids, cut = prompt_ids(self.engine, task.prompt, self.plan.max_new_tokens)
        sampling = replace(self.plan.sampling, seed=task.seed)
        turns = [("autoregressive", self.engine.autoregressive), ("method", self.engine.generate)]
        if (sample + run) % 2:
            turns.reverse()
        done = {
            name: warm(lambda generate=generate: generate(ids, self.plan.max_new_tokens, sampling=sampling))
            for name, generate in turns
        }
        method, baseline = done["method"], done["autoregressive"]
        return SampleRecord(
            bucket=bucket,
            sample=sample,
            run=run,
            seed=task.seed,
            source=Path(task.prompt.source).name,
            prompt_sha256=task.prompt_sha256,
            prompt_tokens=len(ids),
            cut=cut,
            accepted=[one_round.accepted for one_round in method.rounds],
            drafted=[one_round.drafted for one_round in method.rounds],
            first_difference=first_difference(method.token_ids, baseline.token_ids),
            method=Timing.of(method),
            autoregressive=Timing.of(baseline),
            commit=self.commit,
            answered_right=judged(self.engine, method.text, task.prompt),
            worker=self.worker,
        )


def prompt_ids(engine: SpecExtend, prompt: Prompt, max_new_tokens: int) -> tuple[Tensor, bool]:
    """[N] prompt ids that leave room for the new tokens, and whether the middle had to go for it."""
    ids = engine.encode(prompt.text)
    limit = engine.max_prompt_tokens(max_new_tokens)
    return (cut_to_fit(ids, limit), True) if len(ids) > limit else (ids, False)


def judged(engine: SpecExtend, text: str, prompt: Prompt) -> bool | None:
    """Whether `text` is right; the bundled model knows nothing: its hits would be luck, and are not counted."""
    if "answer" not in prompt.extra or engine.models.name.split()[0] == "bundled":
        return None
    return is_right(text, str(prompt.extra["answer"]))


def warm(generate: Callable[[], Generation]) -> Generation:
    """A generation that nothing had to be captured for; after `TRIES` one that captures every time is taken as it is.

    Its clocks leave capturing out, but what it captured in between has cooled the machine down.
    """
    for _ in range(TRIES):
        generation = generate()
        if not (torch.cuda.is_available() and getattr(generation, "capture_s", 0.0)):
            break
    return generation
