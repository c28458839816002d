"""An evaluation: what the journal lacks is handed to workers, and what they measure is written down.

Each prompt is decoded once by the method and once autoregressively by the same process. The two take turns, and who
goes first alternates, so that a machine that slows down slows both. Records go to a journal (`<output>.jsonl`) as they
are measured; the per-length figures (`<output>.json`) are derived from it.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from specextend.bench import OUTPUT_BUCKET, Journal, SampleRecord, aggregate, write_json
from specextend.errors import ConfigError
from specextend.plan import Plan, Task, default_output, label
from specextend.workers import Failure, Workers

DECODE_COST = 16  # one new token takes about as long as 16 prompt tokens; only the remaining time shown depends on it


def evaluate(
    workers: Workers,
    plan: Plan,
    output_file: Path | None = None,
    *,
    fresh: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Have `workers` measure what the journal lacks, write the per-length JSON after each length, return the summary.

    Ctrl-C keeps what was measured, writes the JSON for it and exits with status 130. Tasks that were given up stand in
    the summary as "failed"; the same plan tries them again.

    Args:
        output_file: the per-length JSON; the journal lies beside it. None: `default_output`.
        fresh: discard what an earlier evaluation left there.
        console: where progress and the final table go.
    """
    console = console or stdout_console()
    manifest = workers.manifest(plan)
    output_file = output_file or default_output(manifest["setting"])
    journal = _open_journal(output_file, manifest, fresh=fresh)
    todo = _pending(plan, journal)
    failed: list[str] = []
    try:
        with Reporter(console, todo, plan) as reporter:
            for task, outcome in _by_length(workers.measure(plan, todo, reporter), todo, output_file, journal):
                if isinstance(outcome, Failure):
                    failed.append(f"{label(task)} ({outcome.reason})")
                    reporter.note(f"given up: {failed[-1]}")
                else:
                    journal.append(outcome)
                    reporter.finish(task, outcome)
    except KeyboardInterrupt:
        kept = f"{len(journal.records)} records kept in {journal.path}" if journal.records else "nothing measured yet"
        print(f"Interrupted: {kept}; the same command resumes", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if journal.records:
            write_json(output_file, per_length(journal))
    report = per_length(journal)
    console.print(results_table(report))
    if plan.max_new_tokens > OUTPUT_BUCKET:
        console.print(output_table(report))
    return summarize(report, output_file, journal.path) | ({"failed": failed} if failed else {})


def _by_length(
    outcomes: Iterator[tuple[Task, SampleRecord | Failure]], todo: list[Task], output_file: Path, journal: Journal
) -> Iterator[tuple[Task, SampleRecord | Failure]]:
    """`outcomes`, the per-length JSON being written whenever those of a length are complete."""
    missing = Counter(task.key[0] for task in todo)
    for task, outcome in outcomes:
        yield task, outcome
        missing[task.key[0]] -= 1
        if not missing[task.key[0]] and journal.records:
            write_json(output_file, per_length(journal))


def _open_journal(output_file: Path, manifest: dict[str, Any], *, fresh: bool) -> Journal:
    if output_file.suffix != ".json":
        raise ConfigError(f"output_file is {output_file}; it must end in .json (the records go to .jsonl beside it)")
    path = output_file.with_suffix(".jsonl")
    if fresh:
        path.unlink(missing_ok=True)
        output_file.unlink(missing_ok=True)
    return Journal(path, manifest)


def _pending(plan: Plan, journal: Journal) -> list[Task]:
    """Tasks not in the journal yet; ConfigError where it holds a record of another text under the same index."""
    todo = []
    for task in plan.tasks():
        record = journal.find(task.key)
        if record is None:
            todo.append(task)
        elif record.prompt_sha256 != task.prompt_sha256:
            raise ConfigError(
                f"{journal.path} holds {task.key[0]} sample {task.key[1]} with another text: the prompts changed. "
                "Pass --fresh to start over or another --output_file"
            )
    return todo


# --- reporting ------------------------------------------------------------------------------------------------------


def per_length(journal: Journal) -> dict[str, Any]:
    """The per-length speedup file: figures by nominal length, and the manifest."""
    commits = []
    for record in journal.records:
        if record.commit not in commits:
            commits.append(record.commit)
    return aggregate(journal.records) | {"manifest": {**journal.manifest, "commits": commits}}


def summarize(report: dict[str, Any], output_file: Path, records_file: Path) -> dict[str, Any]:
    """What the program prints on its last line."""
    shown = ("avg_accept_length", "speedup", "speedup_decode", "equal_to_autoregressive", "samples")
    return {
        "output": str(output_file),
        "records": str(records_file),
        "method": report["manifest"]["setting"]["method"],
        "lengths": {length: {name: figures[name] for name in shown} for length, figures in _lengths(report)},
    }


def results_table(report: dict[str, Any]) -> Table:
    """The per-length figures as a table for the terminal."""
    setting = report["manifest"]["setting"]
    method = setting["method"]
    table = Table(
        title=f"{setting['data']}, {setting['model']} ({setting['dtype']}, {setting['device']}), {method}, "
        f"temperature {setting['sampling']['temperature']:g}",
        caption="accepted: drafts per round, bonus excluded; tok/s and speedup end to end; equal: samples",
    )
    headings = ("accepted", "tokens/round", "tok/s AR", f"tok/s {method}", "speedup", "speedup decode", "equal")
    for heading in ("length", "prompt tokens", *headings):
        table.add_column(heading, justify="right")
    for length, figures in _lengths(report):
        table.add_row(
            length,
            f"{figures['prompt_tokens']['mean']:,.0f}",
            format_figure(figures["avg_accept_length"]),
            format_figure(figures["tokens_per_round"]),
            format_figure(figures["autoregressive"]["tokens_per_sec"], 1),
            format_figure(figures["avg_tokens_per_sec"], 1),
            format_figure(figures["speedup"]),
            format_figure(figures["speedup_decode"]),
            f"{figures['equal_to_autoregressive']}/{figures['samples']}",
        )
    return table


def output_table(report: dict[str, Any]) -> Table:
    """The figures by position in the output, for long answers."""
    table = Table(title="by position in the output: the context grows while it is written")
    headings = ("accepted", "tokens/round", "decode tok/s AR", "decode tok/s", "speedup decode", "runs")
    for heading in ("length", "output tokens", *headings):
        table.add_column(heading, justify="right")
    for length, by_length in _lengths(report):
        for stretch, figures in by_length["by_output_position"].items():
            table.add_row(
                length,
                stretch,
                format_figure(figures["avg_accept_length"]),
                format_figure(figures["tokens_per_round"]),
                format_figure(figures["autoregressive_decode_tokens_per_sec"], 1),
                format_figure(figures["decode_tokens_per_sec"], 1),
                format_figure(figures["speedup_decode"]),
                str(figures["runs"]),
            )
    return table


def _lengths(report: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return [(name, figures) for name, figures in report.items() if name != "manifest"]


def format_figure(value: float | None, digits: int = 2) -> str:
    """A dash where there is no figure."""
    return "-" if value is None else f"{value:.{digits}f}"


def stdout_console() -> Console:
    """Rich output; 120 columns where stdout is no terminal, so that the table does not break."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


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
        self._bar.update(self._task, description=f"{activity} {self._label(task)}")

    def finish(self, task: Task, record: SampleRecord) -> None:
        self._bar.advance(self._task, self._work(task))
        figures = (
            f"{record.method.tokens_per_s:.1f} tok/s (AR {record.autoregressive.tokens_per_s:.1f}), "
            f"{self._remaining()} left"
        )
        self._bar.update(self._task, figures=figures)
        if not self._console.is_terminal:
            self._console.print(f"{self._label(task)}: {figures}", soft_wrap=True)

    def note(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, soft_wrap=True, markup=False)

    def _label(self, task: Task) -> str:
        return label(task, len(self._plan.buckets[task.key[0]]), self._plan.runs_per_sample)

    def _work(self, task: Task) -> float:
        """Rough cost of a task in prompt tokens, four characters each."""
        return len(task.prompt.text) / 4 + DECODE_COST * self._plan.max_new_tokens

    def _remaining(self) -> str:
        bar = self._bar.tasks[0]
        seconds = (time.monotonic() - self._started) * (bar.total - bar.completed) / bar.completed
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
