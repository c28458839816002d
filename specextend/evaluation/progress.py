"""Progress of an evaluation on the terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from specextend.evaluation.plan import Plan, Task
from specextend.evaluation.records import SampleRecord

DECODE_COST = 16  # one new token takes about as long as 16 prompt tokens; only the remaining time shown depends on it


class Reporter:
    """Progress of an evaluation: a bar with bucket, sample, speed and remaining time; plain lines without a terminal.

    Args:
        todo: the tasks ahead; their prompts' lengths weigh in the remaining time.
    """

    def __init__(self, console: Console, todo: list[Task], plan: Plan) -> None:
        self._console = console
        self._plan = plan
        self._started = time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=sum(map(self._work, todo)), figures="")

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, task: Task, activity: str) -> None:
        self._bar.update(self._task, description=f"{activity} {self._plan.label(task)}")

    def finish(self, task: Task, record: SampleRecord) -> None:
        self._bar.advance(self._task, self._work(task))
        figures = f"{record.speeds}, {self._remaining()} left"
        self._bar.update(self._task, figures=figures)
        if not self._console.is_terminal:
            self._console.print(f"{self._plan.label(task)}: {figures}", soft_wrap=True)

    def note(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, soft_wrap=True, markup=False)

    def _work(self, task: Task) -> float:
        """Rough cost of a task in prompt tokens, four characters each."""
        return len(task.prompt.text) / 4 + DECODE_COST * self._plan.max_new_tokens

    def _remaining(self) -> str:
        bar = self._bar.tasks[0]
        seconds = (time.monotonic() - self._started) * (bar.total - bar.completed) / bar.completed
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
