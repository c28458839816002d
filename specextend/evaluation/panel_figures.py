"""Figures out of panels: arms against autoregressive decoding and against each other, on the same prompts.

Two kinds of averages stand side by side: the mean over prompts of a prompt's own figure, which the paper's tables
show, and the ratio of totals, in which a long answer weighs more. Intervals are 95 % bootstrap intervals: prompts are
drawn with replacement, always with the same seed, so that the same records give the same figures. The runs of a prompt
are one prompt.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from specextend.data.prompts import nominal_tokens
from specextend.errors import InputError
from specextend.evaluation.panel import Panel

POOLED = "all"  # the data sets together
RESAMPLES, SEED = 10_000, 0
RANKS = (2.5, 97.5)
ENOUGH = 20  # prompts, below which a percentile says little
MEASURES = ("accepted", "speedup_decode", "speedup")
Row = dict[str, Any]


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its 95 % interval; None where there is no prompt, an interval from two on."""

    mean: float | None
    low: float | None
    high: float | None
    prompts: int


def read_panels(path: Path) -> tuple[dict[str, Any], list[Panel]]:
    """Manifest and panels of a journal; a last line that is being written is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    try:
        manifest = json.loads(lines[0]) if lines else {}
        if "arms" not in manifest.get("setting", {}):
            raise InputError(
                f"{path} is no journal of several arms; eval_classic.py and eval_eagle.py write them (--arms)"
            )
        return manifest, [Panel.from_json(json.loads(line)) for line in lines[1:]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); measure it anew") from error


def figures_of(panels: Iterable[Panel]) -> list[Row]:
    """A row per temperature (highest first), length (shortest first), data set and arm.

    Several data sets have rows together as well (`POOLED`).
    """
    cells: defaultdict[tuple[float, str, str], list[Panel]] = defaultdict(list)
    names: dict[str, None] = {}
    for panel in panels:
        names[panel.data] = None
        cells[panel.temperature, panel.bucket, panel.data].append(panel)
        cells[panel.temperature, panel.bucket, POOLED].append(panel)
    places = {name: place for place, name in enumerate([*names, POOLED])}
    order = sorted(cells, key=lambda cell: (-cell[0], nominal_tokens(cell[1]), places[cell[2]]))
    rows = []
    for temperature, bucket, data in order:
        if data == POOLED and len(names) == 1:
            continue
        found = cells[temperature, bucket, data]
        where = {"data": data, "length": bucket, "temperature": temperature}
        rows += [where | {"arm": arm} | _figures(found, arm) for arm in _arms(found)]
    return rows


def pooled(rows: Sequence[Row]) -> list[Row]:
    """Those of all data sets together, which are those of the one where there is one."""
    several = any(row["data"] == POOLED for row in rows)
    return [row for row in rows if row["data"] == POOLED or not several]


def paired_difference(panels: Iterable[Panel], one: str, other: str, measure: str) -> Interval:
    """How much larger a measure of arm `one` is than that of `other`, mean over the prompts that both answered.

    Args:
        measure: one of `MEASURES`.
    """
    return _paired(panels, one, other, measure, np.subtract)


def paired_ratio(panels: Iterable[Panel], one: str, other: str, measure: str) -> Interval:
    """A measure of arm `one` over that of `other`, mean of the prompts' ratios."""
    return _paired(panels, one, other, measure, np.divide)


# --- of one arm -----------------------------------------------------------------------------------------------------


class _Sums:
    """What an arm did on each of n prompts, their runs added up: columns [n], as they are or summed over resamples."""

    COLUMNS = "accepted rounds new decode_s tokens total_s ar_new ar_decode_s ar_tokens ar_total_s".split()
    PARTS = {  # numerators and denominators of a measure: one of a rate, two of a speed-up
        "accepted": [("accepted", "rounds")],
        "speedup_decode": [("new", "decode_s"), ("ar_new", "ar_decode_s")],  # new: tokens behind the first
        "speedup": [("tokens", "total_s"), ("ar_tokens", "ar_total_s")],
    }

    def __init__(self, table: np.ndarray):
        self._table = table

    @classmethod
    def of(cls, panels: Sequence[Panel], arm: str) -> _Sums:
        prompts: defaultdict[tuple, np.ndarray] = defaultdict(lambda: np.zeros(len(cls.COLUMNS)))
        for panel in panels:
            answer, alone = panel.arms[arm], panel.autoregressive.timing
            prompts[_prompt(panel)] += (
                sum(answer.accepted), len(answer.accepted),
                answer.timing.new_tokens - 1, answer.timing.decode_s, answer.timing.new_tokens, answer.timing.total_s,
                alone.new_tokens - 1, alone.decode_s, alone.new_tokens, alone.total_s,
            )  # fmt: skip
        return cls(np.array([*prompts.values()]))

    def __len__(self) -> int:
        return len(self._table)

    def resampled(self) -> _Sums:
        """The sums over each of `RESAMPLES` drawings of the prompts."""
        return _Sums(draws(len(self)) @ self._table)

    def together(self) -> _Sums:
        """The sums over all prompts, as of one."""
        return _Sums(self._table.sum(0, keepdims=True))

    def rate(self, above: str, below: str) -> np.ndarray:
        """One column over another [n], NaN where there is nothing to divide by."""
        above, below = (self._table[:, self.COLUMNS.index(name)] for name in (above, below))
        return np.divide(above, below, out=np.full(len(self), np.nan), where=below > 0)

    def measure(self, name: str) -> np.ndarray:
        """One of `MEASURES` for each prompt [n], NaN where there is none."""
        rates = [self.rate(*part) for part in self.PARTS[name]]
        if len(rates) == 1:
            return rates[0]
        return np.divide(*rates, out=np.full(len(self), np.nan), where=rates[1] > 0)


def _figures(panels: Sequence[Panel], arm: str) -> Row:
    clean, row = _without_loops(panels), _core(panels, arm)
    if len(clean) == len(panels):
        return row | {"without_loops": row}
    return row | {"without_loops": _core(clean, arm) if clean else None}


def _core(panels: Sequence[Panel], arm: str) -> Row:
    sums, answers = _Sums.of(panels, arm), [panel.arms[arm] for panel in panels]
    together, resampled = sums.together(), sums.resampled() if len(sums) > 1 else None
    return {
        "prompts": len(sums),
        "runs": len(panels),
        "prompt_tokens": float(np.mean([panel.prompt_tokens for panel in panels])),
        "new_tokens": float(np.mean([answer.timing.new_tokens for answer in answers])),
        **{name: _measured(name, sums, together, resampled) for name in MEASURES},
        "decode_tokens_per_s": _known(together.rate("new", "decode_s")),
        "ar_decode_tokens_per_s": _known(together.rate("ar_new", "ar_decode_s")),
        "ttft_s": float(np.mean([answer.timing.ttft_s for answer in answers])),
        "ar_ttft_s": float(np.mean([panel.autoregressive.timing.ttft_s for panel in panels])),
        "loops": float(np.mean([answer.loops for answer in answers])),
        "distinct_4grams": float(np.mean([answer.distinct_4grams for answer in answers])),
        "price": float(np.mean([answer.price for answer in answers])),
        "plain_share": float(np.mean([answer.plain_share for answer in answers])),
        "gap": max((answer.gap for answer in answers if answer.gap is not None), default=None),
        "equal": len(sums) - len({_prompt(one) for one in panels if one.arms[arm].first_difference is not None}),
    }


def _measured(name: str, sums: _Sums, together: _Sums, resampled: _Sums | None) -> Row:
    """Mean over prompts and ratio of totals, each with its interval; smallest; percentiles where there are enough."""
    each = sums.measure(name)
    each = each[np.isfinite(each)]
    p10, p90 = _percentiles(each, (10, 90)) if len(each) >= ENOUGH else (None, None)
    totals = resampled.measure(name) if resampled else np.array([])
    totals = totals[np.isfinite(totals)]
    total_low, total_high = _percentiles(totals, RANKS) if len(totals) else (None, None)
    mean = interval(each)
    return {
        "mean": mean.mean, "low": mean.low, "high": mean.high,
        "total": _known(together.measure(name)), "total_low": total_low, "total_high": total_high,
        "smallest": float(each.min()) if len(each) else None,
        "p10": p10, "p90": p90,
    }  # fmt: skip


def _known(value: np.ndarray) -> float | None:
    """The one number of [1], None for NaN."""
    return float(value[0]) if np.isfinite(value[0]) else None


def _without_loops(panels: Sequence[Panel]) -> list[Panel]:
    """Those of the prompts on which nobody's answer ends in a loop, so that all arms keep the same."""
    looping = {
        _prompt(panel) for panel in panels if any(one.loops for one in (panel.autoregressive, *panel.arms.values()))
    }
    return [panel for panel in panels if _prompt(panel) not in looping]


# --- of two arms ----------------------------------------------------------------------------------------------------


def _paired(
    panels: Iterable[Panel], one: str, other: str, measure: str, compare: Callable[..., np.ndarray]
) -> Interval:
    both = [panel for panel in panels if one in panel.arms and other in panel.arms]
    if not both:
        return Interval(None, None, None, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = compare(*(_Sums.of(both, arm).measure(measure) for arm in (one, other)))
    return interval(values[np.isfinite(values)])


# --- the bootstrap --------------------------------------------------------------------------------------------------


def interval(values: np.ndarray) -> Interval:
    """The mean of `values` [n], and its percentile bootstrap interval."""
    if not len(values):
        return Interval(None, None, None, 0)
    low, high = _percentiles(draws(len(values)) @ values / len(values), RANKS) if len(values) > 1 else (None, None)
    return Interval(float(np.mean(values)), low, high, len(values))


@lru_cache(maxsize=32)
def draws(n: int) -> np.ndarray:
    """How often each of n prompts was drawn in each resample, [RESAMPLES, n]."""
    drawn = np.random.default_rng(SEED).integers(0, n, (RESAMPLES, n))
    flat = drawn + n * np.arange(RESAMPLES)[:, None]
    return np.bincount(flat.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(float)


def _percentiles(values: np.ndarray, ranks: tuple[float, float]) -> tuple[float, float]:
    low, high = np.percentile(values, ranks)
    return float(low), float(high)


def _prompt(panel: Panel) -> tuple[str, str, int]:
    return panel.data, panel.bucket, panel.sample


def _arms(panels: Sequence[Panel]) -> list[str]:
    return [*dict.fromkeys(name for panel in panels for name in panel.arms)]
