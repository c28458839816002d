"""Records of measured generations: environment, one record per sample and run, a resumable journal, aggregation.

A journal is a JSON Lines file: first the manifest (setting and environment), then one `SampleRecord` per line, written
through to the disk at once. `results/schema.json` describes both the journal and what `aggregate` returns.
"accepted" counts draft tokens without the bonus token; "tokens per round" includes it (autoregressive decoding: 1.0).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import transformers

from specextend.data import ALL_LENGTHS, parse_length
from specextend.errors import ConfigError, InputError

if TYPE_CHECKING:
    from specextend.generate import Generation, Round

T = TypeVar("T")
CLOCKED = (  # figures of a length that depend on how fast the machine is
    "avg_tokens_per_sec decode_tokens_per_sec tokens_per_sec autoregressive_decode_tokens_per_sec ttft_s speedup "
    "speedup_decode speedup_mean_of_ratios stages_s token_s"
).split()
ROOT = Path(__file__).resolve().parent.parent
OUTPUT_BUCKET = 1024  # tokens of the output per figure by position
# may change between the sessions that fill one journal; threads stand in every record
NOT_COMPARED = ("environment.commit", "environment.date", "environment.threads")


# --- what was measured, and where -----------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Hardware, versions and commit of this process; nothing that names the machine or its user."""
    return {
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "ram_gib": _ram_gib(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "gpu_driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _ram_gib() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)


def _commit() -> dict[str, Any] | None:
    """Commit of the checkout, and whether anything but its results differs from it; None outside a checkout."""
    commit = _output_of("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changes = _output_of("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!results")
    return {"id": commit, "dirty": changes is not None}


def _output_of(*command: str) -> str | None:
    """First line a command prints, None where the command is missing, fails or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = finished.stdout.strip().splitlines() if finished.returncode == 0 else []
    return lines[0] if lines else None


# --- one record per sample and run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """The rounds that began within one `OUTPUT_BUCKET` of the output: the context grows while they run."""

    rounds: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def with_round(self, one: Round) -> Stretch:
        seconds = sum(one.seconds.values())
        return Stretch(
            self.rounds + 1, self.accepted + one.accepted, self.tokens + len(one.tokens), self.seconds + seconds
        )

    def __add__(self, other: Stretch) -> Stretch:
        return Stretch(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def stretches_of(generation: Generation) -> list[Stretch]:
    """A generation's rounds by position in the output, bucket after bucket."""
    stretches: list[Stretch] = []
    written = 1  # the prefill's token
    for one in generation.rounds:
        while len(stretches) <= written // OUTPUT_BUCKET:
            stretches.append(Stretch())
        stretches[-1] = stretches[-1].with_round(one)
        written += len(one.tokens)
    return stretches


@dataclass(frozen=True)
class Timing:
    """What one generation cost: seconds by part, rates, memory, and the hash of its token ids.

    Args:
        token_s: percentiles of the seconds per token while decoding, as {"p50": ...}; a round's tokens share its time.
    """

    new_tokens: int
    finish_reason: str
    prefill_s: dict[str, float]
    stages_s: dict[str, float]
    ttft_s: float
    decode_s: float
    total_s: float
    tokens_per_s: float
    decode_tokens_per_s: float
    peak_bytes: int | None
    sha256: str
    by_output: list[Stretch] = field(default_factory=list)
    token_s: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, generation: Generation) -> Timing:
        return cls(
            new_tokens=generation.new_tokens,
            finish_reason=generation.finish_reason,
            prefill_s=dict(generation.prefill_seconds),
            stages_s=generation.stage_seconds(),
            ttft_s=generation.ttft_s,
            decode_s=generation.decode_s,
            total_s=generation.total_s,
            tokens_per_s=generation.tokens_per_s,
            decode_tokens_per_s=generation.decode_tokens_per_s,
            peak_bytes=generation.peak_bytes,
            sha256=hash_tokens(generation.token_ids),
            by_output=stretches_of(generation),
            token_s=_token_percentiles(generation),
        )

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Timing:
        return cls(**entry | {"by_output": [Stretch(**stretch) for stretch in entry.get("by_output", [])]})


def _token_percentiles(generation: Generation) -> dict[str, float]:
    each = [sum(one.seconds.values()) / len(one.tokens) for one in generation.rounds for _ in one.tokens]
    return {f"p{rank}": float(np.percentile(each, rank)) for rank in (50, 90, 99)} if each else {}


@dataclass(frozen=True)
class Worker:
    """The process that measured a record, and what it had to itself.

    Args:
        id: number in the order of start within its run.
        host: name of its machine.
        workers_on_host: processes of its run on that machine, each with cores and a GPU of its own.
        threads: of PyTorch.
        processor: the GPU, else the CPU.
    """

    id: int
    host: str
    workers_on_host: int
    threads: int
    processor: str

    @classmethod
    def here(cls, number: int, workers_on_host: int, device: torch.device) -> Worker:
        """This process, which computes on `device`."""
        processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
        return cls(number, platform.node(), workers_on_host, torch.get_num_threads(), processor)

    @property
    def conditions(self) -> tuple[int, int, str]:
        """What speeds must have in common to be compared."""
        return self.workers_on_host, self.threads, self.processor


@dataclass(frozen=True)
class SampleRecord:
    """One prompt, generated once by the method and once autoregressively in the same process.

    Args:
        bucket: nominal length of the prompt, as `"1K"`.
        sample, run: index of the prompt in its bucket, and of the repetition; `seed` belongs to the two.
        source: file and line of the prompt; `prompt_sha256` is the hash of its text.
        cut: the prompt was longer than the models hold and lost its middle; `prompt_tokens` is what was used.
        accepted, drafted: draft tokens per round, the bonus token excluded.
        first_difference: index of the first new token that differs from the autoregressive one; None when all agree.
        commit: `environment()["commit"]` of the process that measured.
        answered_right: whether the answer is the prompt's own; None where nobody asked, or the model cannot answer.
        worker: who measured it; None in records from before there was more than one.
    """

    bucket: str
    sample: int
    run: int
    seed: int
    source: str
    prompt_sha256: str
    prompt_tokens: int
    cut: bool
    accepted: list[int]
    drafted: list[int]
    first_difference: int | None
    method: Timing
    autoregressive: Timing
    commit: dict[str, Any] | None
    answered_right: bool | None = None
    worker: Worker | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.bucket, self.sample, self.run

    @property
    def equal_to_autoregressive(self) -> bool:
        return self.first_difference is None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"equal_to_autoregressive": self.equal_to_autoregressive}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> SampleRecord:
        fields = {name: value for name, value in entry.items() if name != "equal_to_autoregressive"}
        timings = {name: Timing.from_json(fields.pop(name)) for name in ("method", "autoregressive")}
        worker = fields.pop("worker", None)
        return cls(**fields, **timings, worker=worker and Worker(**worker))


def hash_tokens(token_ids: Sequence[int]) -> str:
    """sha256 of the token ids as little-endian int64."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i8").tobytes()).hexdigest()


def first_difference(left: Sequence[int], right: Sequence[int]) -> int | None:
    """First index at which two token sequences part; None when they are equal, an early end is a difference too."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


# --- the journal ----------------------------------------------------------------------------------------------------


class Journal:
    """Records on disk, append-only: what was appended survives a kill, and the next process goes on from there.

    Args:
        path: the JSON Lines file; opened if it is there, begun with `manifest` if not.
        manifest: `{"setting": ..., "environment": ...}`. An existing journal must have been begun with the same one,
            commit and date aside; ConfigError otherwise.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.records: list[SampleRecord] = []
        lines = _complete_lines(path)
        if len(lines) > 1:
            self.manifest = _parse(path, 1, lines[0], dict)
            _require_same(path, self.manifest, manifest)
            self.records = [
                _parse(path, number, line, SampleRecord.from_json) for number, line in enumerate(lines[1:], start=2)
            ]

    def find(self, key: tuple[str, int, int]) -> SampleRecord | None:
        """The record of (bucket, sample, run), if it was measured already."""
        return next((record for record in self.records if record.key == key), None)

    def append(self, record: SampleRecord) -> None:
        """Write a record through to the disk; the first one brings the manifest with it."""
        assert self.find(record.key) is None, f"{record.key} is in {self.path} already"
        entries = [record.to_json()] if self.records else [self.manifest, record.to_json()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a" if self.records else "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


def _complete_lines(path: Path) -> list[bytes]:
    """Lines of a journal, after cutting off a last one that a killed process left unfinished."""
    content = path.read_bytes() if path.exists() else b""
    if content and not content.startswith(b'{"setting":'):
        raise InputError(f"{path} does not begin with a manifest; choose another --output_file or remove that file")
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(path, complete)
    return content[:complete].splitlines()


def _parse(path: Path, number: int, line: bytes, read: Callable[[dict[str, Any]], T]) -> T:
    try:
        return read(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}:{number} is damaged ({error}); pass --fresh to start over") from error


def _require_same(path: Path, measured: dict[str, Any], wanted: dict[str, Any]) -> None:
    # Through JSON, so that tuples and lists, and keys of either kind, compare equal.
    old, new = (dict(_flatten(json.loads(json.dumps(manifest)))) for manifest in (measured, wanted))
    compared = [name for name in {**old, **new} if not name.startswith(NOT_COMPARED)]
    different = [name for name in compared if old.get(name) != new.get(name)]
    if different:
        shown = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in different)
        raise ConfigError(
            f"{path} holds records of another setting: {shown}. Pass --fresh to start over or another --output_file"
        )


def _flatten(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves of nested dicts with dotted names: `setting.config.tree.nodes`."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in value.items():
        yield from _flatten(inner, f"{name}.{key}" if name else key)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the whole file or nothing: a reader, or a kill, never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# --- aggregation ----------------------------------------------------------------------------------------------------


def aggregate(records: Iterable[SampleRecord]) -> dict[str, dict[str, Any]]:
    """Figures per nominal length, shortest first.

    Rates are ratios of totals (all tokens of a length over all its seconds) and speed-ups ratios of such rates, so that
    a short answer does not weigh as much as a long one; `speedup_mean_of_ratios` is the mean over records instead.
    Spread is over samples, the runs of a sample pooled. Records whose workers' `conditions` differ have no speeds in
    common: such figures are null.
    """
    buckets: defaultdict[str, list[SampleRecord]] = defaultdict(list)
    for record in records:
        buckets[record.bucket].append(record)
    figures = {}
    for bucket in sorted(buckets, key=_nominal_tokens):
        counts = sorted({_workers_on_host(record) for record in buckets[bucket]})
        measured = _aggregate_bucket(buckets[bucket])
        mixed = len(counts) > 1 or len({record.worker.conditions for record in buckets[bucket] if record.worker}) > 1
        figures[bucket] = (_without_speeds(measured) if mixed else measured) | {"workers_on_host": counts}
    return figures


def _workers_on_host(record: SampleRecord) -> int:
    return record.worker.workers_on_host if record.worker else 1


def _without_speeds(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures, those that a clock had a part in emptied: they were taken under conditions that do not compare."""
    kept = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            kept[name] = dict.fromkeys(value) if name in CLOCKED else _without_speeds(value)
        else:
            kept[name] = None if name in CLOCKED else value
    return kept


def _nominal_tokens(bucket: str) -> float:
    return math.inf if bucket == ALL_LENGTHS else parse_length(bucket)


def _aggregate_bucket(records: list[SampleRecord]) -> dict[str, Any]:
    method = [record.method for record in records]
    baseline = [record.autoregressive for record in records]
    samples: defaultdict[int, list[SampleRecord]] = defaultdict(list)
    for record in records:
        samples[record.sample].append(record)
    prompt_tokens = [record.prompt_tokens for record in records]
    peaks = [timing.peak_bytes for timing in method if timing.peak_bytes is not None]
    return {
        "avg_accept_length": _accepted_per_round(records),
        "avg_tokens_per_sec": _tokens_per_s(method),
        "total_generated_tokens": sum(timing.new_tokens for timing in method),
        "runs": len(records),
        "samples": len(samples),
        "tokens_per_round": _tokens_per_round(records),
        "decode_tokens_per_sec": _decode_tokens_per_s(method),
        "ttft_s": _mean_ttft_s(method),
        "speedup": _ratio(_tokens_per_s(method), _tokens_per_s(baseline)),
        "speedup_decode": _speedup_decode(records),
        "speedup_mean_of_ratios": _mean(
            _ratio(record.method.tokens_per_s, record.autoregressive.tokens_per_s) for record in records
        ),
        "peak_bytes": max(peaks, default=None),
        "stages_s": _mean_by_name([_stages(timing) for timing in method]),
        "token_s": _mean_by_name([timing.token_s for timing in method]),
        "autoregressive": {
            "tokens_per_sec": _tokens_per_s(baseline),
            "decode_tokens_per_sec": _decode_tokens_per_s(baseline),
            "ttft_s": _mean_ttft_s(baseline),
            "total_generated_tokens": sum(timing.new_tokens for timing in baseline),
        },
        "prompt_tokens": {
            "mean": statistics.fmean(prompt_tokens),
            "min": min(prompt_tokens),
            "max": max(prompt_tokens),
        },
        "cut": sum(any(record.cut for record in runs) for runs in samples.values()),
        "equal_to_autoregressive": sum(
            all(record.equal_to_autoregressive for record in runs) for runs in samples.values()
        ),
        "spread": {
            "avg_accept_length": _spread(samples, _accepted_per_round),
            "decode_tokens_per_sec": _spread(samples, lambda runs: _decode_tokens_per_s([run.method for run in runs])),
            "speedup_decode": _spread(samples, _speedup_decode),
        },
        "answered_right": _mean(record.answered_right for record in records),
        "by_output_position": _by_output_position(records),
    }


def _stages(timing: Timing) -> dict[str, float]:
    """Seconds of a generation by stage, the prefills as "prefill target" and "prefill draft"."""
    return {f"prefill {name}": seconds for name, seconds in timing.prefill_s.items()} | timing.stages_s


def _mean_by_name(figures: list[dict[str, float]]) -> dict[str, float]:
    """Means of figures that not every generation has; an absent one counts as nothing."""
    names = dict.fromkeys(name for one in figures for name in one)
    return {name: statistics.fmean(one.get(name, 0.0) for one in figures) for name in names}


def _by_output_position(records: list[SampleRecord]) -> dict[str, dict[str, Any]]:
    """Figures by position in the output: "0-1K", "1K-2K", ..."""
    figures = {}
    for bucket in range(max((len(record.method.by_output) for record in records), default=0)):
        method, baseline = (
            sum((timing.by_output[bucket] for timing in timings if bucket < len(timing.by_output)), Stretch())
            for timings in ([record.method for record in records], [record.autoregressive for record in records])
        )
        rate, baseline_rate = (_ratio(stretch.tokens, stretch.seconds) for stretch in (method, baseline))
        figures[f"{_in_k(bucket)}-{_in_k(bucket + 1)}"] = {
            "runs": sum(bucket < len(record.method.by_output) for record in records),
            "avg_accept_length": _ratio(method.accepted, method.rounds),
            "tokens_per_round": _ratio(method.tokens, method.rounds),
            "decode_tokens_per_sec": rate,
            "autoregressive_decode_tokens_per_sec": baseline_rate,
            "speedup_decode": _ratio(rate, baseline_rate),
        }
    return figures


def _in_k(bucket: int) -> str:
    return f"{bucket * OUTPUT_BUCKET // 1024}K" if bucket else "0"


def _accepted_per_round(records: list[SampleRecord]) -> float | None:
    return _mean(count for record in records for count in record.accepted)


def _tokens_per_round(records: list[SampleRecord]) -> float | None:
    """The first token comes out of the prefill and belongs to no round."""
    return _ratio(
        sum(record.method.new_tokens - 1 for record in records), sum(len(record.accepted) for record in records)
    )


def _tokens_per_s(timings: list[Timing]) -> float | None:
    return _ratio(sum(timing.new_tokens for timing in timings), sum(timing.total_s for timing in timings))


def _decode_tokens_per_s(timings: list[Timing]) -> float | None:
    return _ratio(sum(timing.new_tokens - 1 for timing in timings), sum(timing.decode_s for timing in timings))


def _speedup_decode(records: list[SampleRecord]) -> float | None:
    return _ratio(
        _decode_tokens_per_s([record.method for record in records]),
        _decode_tokens_per_s([record.autoregressive for record in records]),
    )


def _mean_ttft_s(timings: list[Timing]) -> float:
    return statistics.fmean(timing.ttft_s for timing in timings)


def _spread(
    samples: dict[int, list[SampleRecord]], figure: Callable[[list[SampleRecord]], float | None]
) -> dict[str, float | None]:
    """Standard deviation (n - 1), 10th and 90th percentile of a figure over samples."""
    values = [value for value in map(figure, samples.values()) if value is not None]
    if not values:
        return {"std": None, "p10": None, "p90": None}
    p10, p90 = np.percentile(values, [10, 90])
    return {"std": statistics.stdev(values) if len(values) > 1 else None, "p10": float(p10), "p90": float(p90)}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where there is nothing to divide by: a generation that ended with its first token has no decoding speed."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator
