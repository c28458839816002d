"""Figures per nominal length out of records."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from specextend.data.prompts import nominal_tokens
from specextend.evaluation.records import OUTPUT_BUCKET, SampleRecord, Stretch, Timing

CLOCKED = (  # figures of a length that depend on how fast the machine is
    "avg_tokens_per_sec decode_tokens_per_sec tokens_per_sec autoregressive_decode_tokens_per_sec ttft_s speedup "
    "speedup_decode speedup_mean_of_ratios stages_s token_s"
).split()


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
    for bucket in sorted(buckets, key=nominal_tokens):
        counts = sorted({_workers_on_host(record) for record in buckets[bucket]})
        measured = _aggregate_bucket(buckets[bucket])
        # a record from before there were workers was measured by one process alone; its journal names the processor
        named = {record.worker.conditions for record in buckets[bucket] if record.worker}
        mixed = len(counts) > 1 or len(named) > 1
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
