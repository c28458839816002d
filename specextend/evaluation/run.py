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

from specextend.errors import CapacityError, ConfigError
from specextend.evaluation.aggregate import aggregate
from specextend.evaluation.files import check_output, locked
from specextend.evaluation.journal import Journal, write_json
from specextend.evaluation.plan import Plan, Task, default_output
from specextend.evaluation.progress import Reporter
from specextend.evaluation.records import OUTPUT_BUCKET, SampleRecord
from specextend.evaluation.tables import lengths_of, output_table, results_table
from specextend.evaluation.terminal import PlainConsole
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
        fresh: start over; what an earlier evaluation left there moves aside once there is a record to take its place.
        console: where progress and the final table go.
    """
    console = console or PlainConsole()
    manifest = workers.manifest(plan)
    output_file = output_file or default_output(manifest["setting"])
    check_outputs(output_file)
    with locked(output_file):
        journal = Journal(output_file.with_suffix(".jsonl"), manifest, fresh=fresh, derived=output_file)
        todo = pending(plan, journal)
        if todo:
            check_room(workers.limit, plan.max_new_tokens)
        failed = _measure(workers, plan, todo, journal, console, output_file)
    report = per_length(journal)
    console.print(results_table(report, console.width))
    if plan.max_new_tokens > OUTPUT_BUCKET:
        console.print(output_table(report, console.width))
    return summarize(report, output_file, journal.path) | ({"failed": failed} if failed else {})


def check_outputs(output_file: Path) -> None:
    """ConfigError where the per-length JSON or its journal cannot be written, or another evaluation writes them."""
    if output_file.suffix != ".json":
        raise ConfigError(f"output_file is {output_file}; it must end in .json (the records go to .jsonl beside it)")
    for path in (output_file, output_file.with_suffix(".jsonl")):
        check_output(path)
    with locked(output_file):
        pass


def _measure(
    workers: Workers, plan: Plan, todo: list[Task], journal: Journal, console: Console, output_file: Path
) -> list[str]:
    """Have `todo` measured and written down; what was given up, a line each."""
    failed: list[str] = []
    try:
        with Reporter(console, todo, plan) as reporter:
            for task, outcome in _by_length(workers.measure(plan, todo, reporter), todo, output_file, journal):
                if isinstance(outcome, Failure):
                    failed.append(f"{task.name} ({outcome.reason})")
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
    return failed


def check_room(limit: int, max_new_tokens: int) -> None:
    """CapacityError where the answers alone would fill a model of `limit` positions."""
    if max_new_tokens >= limit:
        raise CapacityError(
            f"max_gen_len is {max_new_tokens}, but the model holds {limit} positions, the prompt's included; ask for "
            f"at most {limit - 1}"
        )


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


def pending(plan: Plan, journal: Journal) -> list[Task]:
    """Tasks not in the journal yet; ConfigError where it holds a record of another text under the same index."""
    todo = []
    for task in plan.tasks():
        record = journal.find(task.key)
        if record is None:
            todo.append(task)
        elif record.prompt_sha256 != task.prompt_sha256:
            raise ConfigError(
                f"{journal.path} holds {task.name} with another text: the prompts changed. "
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
        "lengths": {length: {name: figures[name] for name in shown} for length, figures in lengths_of(report)},
    }
