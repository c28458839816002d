"""An evaluation: what the journal lacks is handed to workers, and what they measure is written down.

Each prompt is decoded once by the method and once autoregressively by the same process. The two take turns, and who
goes first alternates, so that a machine that slows down slows both. Records go to a journal (`<output>.jsonl`) as they
are measured; the per-length figures (`<output>.json`) are derived from it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from specextend.errors import ConfigError
from specextend.evaluation.aggregate import aggregate
from specextend.evaluation.journal import Journal, write_json
from specextend.evaluation.plan import Plan, Task, default_output, label
from specextend.evaluation.progress import Reporter
from specextend.evaluation.records import OUTPUT_BUCKET, SampleRecord
from specextend.evaluation.tables import _lengths, output_table, results_table, stdout_console
from specextend.evaluation.workers import Failure, Workers


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
