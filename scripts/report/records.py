"""Methods compared on the prompts they share: figures of per-length files, over the records that all of them hold.

A per-length file holds the figures of all its records, and two files may hold different prompts. What stands side by
side, or is divided by one another, therefore comes from here: `on_shared` goes back to the journals beside the files.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

Key = tuple[int, int, str]  # sample, run, hash of the prompt
Record = dict[str, Any]
SETTING = (  # columns of `make_tables.read_results` that are no figures
    "file folder journal data temperature method model draft dtype device hardware tree max_gen_len versions length "
    "order"
).split()
COUNTS = ["samples", "runs", "prompt_tokens.mean"]  # what files without a journal must agree in


def on_shared(rows: pd.DataFrame, methods: Iterable[str] | None = None) -> pd.DataFrame:
    """The rows of `methods` (all of them), at each length over the records that all methods measured there hold.

    Rows that hold no more than that stay as they are; others keep the figures of `figures_of` and no more. A length
    where nothing is shared is left out.

    Args:
        rows: as `make_tables.read_results` gives them, of one data set; a method once per length.
    """
    if methods is not None:
        rows = rows[rows["method"].isin(list(methods))]
    kept = [row for _, group in rows.groupby("length", sort=False) for row in _shared(group)]
    return pd.DataFrame(kept, columns=rows.columns).sort_index().infer_objects()


def lead(rows: pd.DataFrame, one: str, other: str, figure: str) -> pd.Series:
    """`figure` of `one` over that of `other`, by length, on the records that both hold."""
    table = on_shared(rows, (one, other)).pivot(index="length", columns="method", values=figure).astype(float)
    if not {one, other} <= set(table.columns):
        return pd.Series(dtype=float)
    return (table[one] / table[other]).dropna()


def _shared(group: pd.DataFrame) -> list[pd.Series]:
    """The rows of one length over what they share."""
    if len(group) == 1:
        return [group.iloc[0]]
    held = [records_of(row.get("journal"), row["length"]) for _, row in group.iterrows()]
    if not all(held):  # a file without its journal: only its counts tell what it holds
        same = len(group[[name for name in COUNTS if name in group]].drop_duplicates()) == 1
        return [row for _, row in group.iterrows()] if same else []
    keys = set.intersection(*map(set, held))
    if not keys:
        return []
    return [
        row if len(records) == len(keys) else _with_figures(row, [records[key] for key in sorted(keys)])
        for (_, row), records in zip(group.iterrows(), held, strict=True)
    ]


def _with_figures(row: pd.Series, records: list[Record]) -> pd.Series:
    figures = figures_of(records)
    values = {name: row[name] if name in SETTING else figures.get(name) for name in row.index}
    return pd.Series(values, name=row.name, dtype=object)


def records_of(journal: str | None, length: str) -> dict[Key, Record]:
    """The records of one length by sample, run and prompt; none where there is no journal."""
    return _journal(journal).get(length, {}) if isinstance(journal, str) else {}


@cache
def _journal(path: str) -> dict[str, dict[Key, Record]]:
    found: defaultdict[str, dict[Key, Record]] = defaultdict(dict)
    lines = Path(path).read_text(encoding="utf-8").splitlines()[1:] if Path(path).exists() else []
    for record in map(json.loads, lines):
        found[record["bucket"]][record["sample"], record["run"], record["prompt_sha256"]] = record
    return found


def figures_of(records: list[Record]) -> dict[str, Any]:
    """What `specextend.bench.aggregate` says of a length's records, with dotted names, without importing PyTorch.

    Rates are ratios of totals; speeds are left out where the workers' conditions differ.
    """
    samples: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        samples[record["sample"]].append(record)
    figures = {
        "samples": len(samples),
        "runs": len(records),
        "prompt_tokens.mean": float(np.mean([record["prompt_tokens"] for record in records])),
        "avg_accept_length": _accepted(records),
        "tokens_per_round": _ratio(
            sum(record["method"]["new_tokens"] - 1 for record in records), sum(len(r["accepted"]) for r in records)
        ),
        "equal_to_autoregressive": sum(all(r["equal_to_autoregressive"] for r in runs) for runs in samples.values()),
        **_spread("avg_accept_length", map(_accepted, samples.values())),
    }
    return figures if _conditions_differ(records) else figures | _speeds(records, list(samples.values()))


def _speeds(records: list[Record], samples: list[list[Record]]) -> dict[str, Any]:
    overall, decode = _rate(records, "method", "total_s"), _rate(records, "method", "decode_s")
    baseline = {
        "autoregressive.tokens_per_sec": _rate(records, "autoregressive", "total_s"),
        "autoregressive.decode_tokens_per_sec": _rate(records, "autoregressive", "decode_s"),
    }
    return {
        "avg_tokens_per_sec": overall,
        "decode_tokens_per_sec": decode,
        **baseline,
        "ttft_s": float(np.mean([record["method"]["ttft_s"] for record in records])),
        "speedup": _ratio(overall, baseline["autoregressive.tokens_per_sec"]),
        "speedup_decode": _speedup_decode(records),
        "speedup_mean_of_ratios": float(
            np.mean([record["method"]["tokens_per_s"] / record["autoregressive"]["tokens_per_s"] for record in records])
        ),
        **_spread("speedup_decode", map(_speedup_decode, samples)),
    }


def _accepted(records: list[Record]) -> float | None:
    """Draft tokens kept per round, of all rounds."""
    return _ratio(
        sum(sum(record["accepted"]) for record in records), sum(len(record["accepted"]) for record in records)
    )


def _rate(records: list[Record], of: str, seconds: str) -> float | None:
    """Tokens over time of all records; the first token comes out of the prefill and is not decoded."""
    first = 1 if seconds == "decode_s" else 0
    return _ratio(sum(r[of]["new_tokens"] - first for r in records), sum(r[of][seconds] for r in records))


def _speedup_decode(records: list[Record]) -> float | None:
    return _ratio(_rate(records, "method", "decode_s"), _rate(records, "autoregressive", "decode_s"))


def _spread(name: str, values: Iterable[float | None]) -> dict[str, float | None]:
    """10th and 90th percentile over samples."""
    known = [value for value in values if value is not None]
    return {f"spread.{name}.p{rank}": float(np.percentile(known, rank)) if known else None for rank in (10, 90)}


def _conditions_differ(records: list[Record]) -> bool:
    workers = [record["worker"] for record in records if record.get("worker")]
    on_host = {(record.get("worker") or {}).get("workers_on_host", 1) for record in records}
    return len(on_host) > 1 or len({(worker["threads"], worker["processor"]) for worker in workers}) > 1


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None
