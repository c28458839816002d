"""Sweeping a data set's length buckets: every prompt once by the method, once autoregressively, in one process.

The two take turns, and who goes first alternates, so that a machine that slows down slows both. Records go to a
journal (`<output>.jsonl`) as they are measured; the per-length figures (`<output>.json`) are derived from it.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from specextend.answers import is_right
from specextend.bench import (
    OUTPUT_BUCKET,
    ROOT,
    Journal,
    SampleRecord,
    Timing,
    aggregate,
    environment,
    first_difference,
    write_json,
)
from specextend.config import SamplingConfig
from specextend.data import Prompt, cut_to_fit, find_buckets, read_prompts
from specextend.errors import ConfigError, InputError
from specextend.methods import name_of

if TYPE_CHECKING:
    from torch import Tensor

    from specextend import SpecExtend

WARM_UP_PROMPT_TOKENS = 1024
WARM_UP_NEW_TOKENS = 8
DECODE_COST = 16  # one new token takes about as long as 16 prompt tokens; only the remaining time shown depends on it


# --- what to measure ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One prompt to be measured once; `key` is (bucket, sample, run)."""

    key: tuple[str, int, int]
    prompt: Prompt
    seed: int

    @property
    def prompt_sha256(self) -> str:
        return hashlib.sha256(self.prompt.text.encode()).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What one evaluation measures.

    Args:
        data: name of the data set.
        buckets: prompts by nominal length, shortest first.
        runs_per_sample: how often each prompt is measured.
        max_new_tokens: new tokens per generation at most.
        sampling: of method and baseline alike; run r of sample i uses seed + 1000 i + r.
    """

    data: str
    buckets: dict[str, list[Prompt]]
    runs_per_sample: int = 2
    max_new_tokens: int = 256
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self) -> None:
        require_positive(runs_per_sample=self.runs_per_sample, max_gen_len=self.max_new_tokens)

    def tasks(self) -> Iterator[Task]:
        for bucket, prompts in self.buckets.items():
            for sample, prompt in enumerate(prompts):
                for run in range(self.runs_per_sample):
                    yield Task((bucket, sample, run), prompt, self.sampling.seed + 1000 * sample + run)


def require_positive(**settings: int) -> None:
    """ConfigError for the first setting below 1."""
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


def read_buckets(data_dir: Path, samples_per_length: int, lengths: Sequence[str] = ()) -> dict[str, list[Prompt]]:
    """The first prompts of each length bucket of a data set, of the `lengths` asked for or of all."""
    require_positive(samples_per_length=samples_per_length)
    paths = find_buckets(data_dir)
    unknown = [length for length in lengths if length not in paths]
    if unknown:
        raise InputError(f"{data_dir} has no length {', '.join(unknown)}; it has {', '.join(paths)}")
    return {
        bucket: read_prompts(path, limit=samples_per_length)
        for bucket, path in paths.items()
        if not lengths or bucket in lengths
    }


def setting_of(engine: SpecExtend, plan: Plan) -> dict[str, Any]:
    """All that decides the numbers besides hardware, versions and prompts; a journal holds records of one setting."""
    models = engine.models
    return {
        "data": plan.data,
        "model": public_name(models.name),
        "target": public_name(models.target_id),
        "draft": public_name(models.draft_id or "none"),
        "dtype": str(models.dtype).removeprefix("torch."),
        "device": models.device.type,
        "method": name_of(engine.config),
        "config": asdict(engine.config),
        "sampling": asdict(plan.sampling),
        "seeds": "seed + 1000 * sample + run, the same for method and baseline",
        "max_gen_len": plan.max_new_tokens,
        "warm_up": {
            "generations": "one by the method and one autoregressively per length, not measured",
            "prompt_tokens": WARM_UP_PROMPT_TOKENS,
            "new_tokens": WARM_UP_NEW_TOKENS,
        },
        "order": "method and baseline take turns on each prompt; who is first alternates",
    }


def default_output(setting: dict[str, Any], directory: Path = Path("results")) -> Path:
    """`results/<data>_<model>_<method>.json`, with the temperature in the name when it is not 0."""
    temperature = setting["sampling"]["temperature"]
    parts = [
        setting["data"],
        Path(setting["model"]).name,
        setting["method"],
        *([f"t{temperature:g}"] * (temperature > 0)),
    ]
    return directory / f"{'_'.join(parts)}.json"


def public_name(model: str) -> str:
    """A hub id as it is, a local path without what lies above the checkout or the model's own folder."""
    path = Path(model)
    if not path.is_absolute():
        return model
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


# --- measuring ------------------------------------------------------------------------------------------------------


def evaluate(
    engine: SpecExtend,
    plan: Plan,
    output_file: Path | None = None,
    *,
    fresh: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Measure what the journal lacks, write the per-length JSON after each bucket, return the summary.

    Ctrl-C keeps what was measured, writes the JSON for it and exits with status 130.

    Args:
        output_file: the per-length JSON; the journal lies beside it. None: `default_output`.
        fresh: discard what an earlier evaluation left there.
        console: where progress and the final table go.
    """
    console = console or stdout_console()
    manifest = {"setting": setting_of(engine, plan), "environment": environment()}
    output_file = output_file or default_output(manifest["setting"])
    journal = _open_journal(output_file, manifest, fresh=fresh)
    todo = _pending(plan, journal)
    meter = Meter(engine, plan, commit=manifest["environment"]["commit"])
    try:
        with Reporter(console, todo, plan) as reporter:
            for bucket in plan.buckets:
                _measure_bucket(meter, [task for task in todo if task.key[0] == bucket], journal, reporter)
                write_json(output_file, per_length(journal))
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
    return summarize(report, output_file, journal.path)


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


def _measure_bucket(meter: Meter, tasks: list[Task], journal: Journal, reporter: Reporter) -> None:
    if tasks:
        reporter.begin(tasks[0], "warm-up before")
        meter.warm_up(tasks[0].prompt)
    for task in tasks:
        reporter.begin(task, "measuring")
        record = meter.measure(task)
        journal.append(record)
        reporter.finish(task, record)


@dataclass(frozen=True)
class Meter:
    """Measures method and baseline on one prompt after the other.

    Args:
        commit: `environment()["commit"]` of this process.
    """

    engine: SpecExtend
    plan: Plan
    commit: dict[str, Any] | None

    def warm_up(self, prompt: Prompt) -> None:
        """A short generation of either kind, not measured: kernels are loaded, threads started, memory is in place."""
        ids, _ = self._prompt_ids(prompt)
        new_tokens = min(WARM_UP_NEW_TOKENS, self.plan.max_new_tokens)
        for generate in (self.engine.autoregressive, self.engine.generate):
            generate(ids[:WARM_UP_PROMPT_TOKENS], new_tokens, sampling=self.plan.sampling)

    def measure(self, task: Task) -> SampleRecord:
        """Exactly one generation by the method and one autoregressively, of the same prompt with the same seed."""
        bucket, sample, run = task.key
        ids, cut = self._prompt_ids(task.prompt)
        sampling = replace(self.plan.sampling, seed=task.seed)
        turns = [("autoregressive", self.engine.autoregressive), ("method", self.engine.generate)]
        if (sample + run) % 2:
            turns.reverse()
        done = {name: generate(ids, self.plan.max_new_tokens, sampling=sampling) for name, generate in turns}
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
            answered_right=self._is_right(method.text, task.prompt),
        )

    def _is_right(self, text: str, prompt: Prompt) -> bool | None:
        """The bundled model knows nothing: its hits would be luck, and are not counted."""
        if "answer" not in prompt.extra or self.engine.models.name == "bundled":
            return None
        return is_right(text, str(prompt.extra["answer"]))

    def _prompt_ids(self, prompt: Prompt) -> tuple[Tensor, bool]:
        """[N] prompt ids that leave room for the new tokens, and whether the middle had to go for it."""
        ids = self.engine.encode(prompt.text)
        limit = self.engine.fits(self.plan.max_new_tokens)
        return (cut_to_fit(ids, limit), True) if len(ids) > limit else (ids, False)


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

    def _label(self, task: Task) -> str:
        bucket, sample, run = task.key
        return (
            f"{bucket} sample {sample + 1}/{len(self._plan.buckets[bucket])} run {run + 1}/{self._plan.runs_per_sample}"
        )

    def _work(self, task: Task) -> float:
        """Rough cost of a task in prompt tokens, four characters each."""
        return len(task.prompt.text) / 4 + DECODE_COST * self._plan.max_new_tokens

    def _remaining(self) -> str:
        bar = self._bar.tasks[0]
        seconds = (time.monotonic() - self._started) * (bar.total - bar.completed) / bar.completed
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
