"""Our engine beside vLLM on the same weights and prompts: results/<gpu>/vllm.json of `scripts.bench.vllm`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.report.markdown import Column, table_of
from scripts.report.records import attempt, read_documents

OURS, THEIRS = "ours_ar", "vllm_ar"
COLUMNS = [
    Column("prefill s: ours", f"prefill {OURS}", 3),
    Column("prefill s: vLLM", f"prefill {THEIRS}", 3),
    Column("ours, AR", f"rate {OURS}", 0),
    Column("ours, the paper's tree", "rate ours_tree_0.7", 0),
    Column("ours, threshold 0.05", "rate ours_tree_0.05", 0),
    Column("vLLM, AR", f"rate {THEIRS}", 0),
    Column("vLLM, draft model, 5 tokens", "rate vllm_draft_5", 0),
    Column("vLLM, draft model, 8 tokens", "rate vllm_draft_8", 0),
    Column("vLLM, n-grams", "rate vllm_ngram", 0),
    Column("best of ours over best of vLLM's", "lead"),
]


def vllm_reports(results: Path) -> Iterator[str]:
    """A section per GPU on which both engines were measured."""
    for path, record in read_documents(results, "vllm.json"):
        file = path.relative_to(results).as_posix()
        section = attempt(path, lambda record=record, file=file: "\n\n".join(_section(record, file)))
        if section:
            yield section


def _section(record: dict[str, Any], file: str) -> Iterator[str]:
    rows = on_shared_prompts(pd.DataFrame(record["rows"]))
    figures = figures_of(rows)
    environment, prompts = record["environment"], rows.groupby("tokens")[["data", "sample"]].nunique().prod(axis=1)
    yield (
        f"One {record['gpu']}, {record['dtype']}, batch 1, temperature 0, vLLM {environment['vllm']} and torch "
        f"{environment['torch']}; both engines read the same checkpoints (the bundled pair widened to "
        f"{record['shape']['layers']} layers of {record['shape']['hidden']}) and the same prompts, {prompts.min()} per "
        f"length. Seconds of whole calls by the clock, medians of {len(rows['one_token_s'].iloc[0])}: prefill is a "
        f"call for one token, decoding what a call for {rows['decoded'].max() + 1} takes longer. "
        f"File: [{file}]({file}).\nSeconds of reading the prompt, then decode tokens/s:"
    )
    yield table_of(figures, COLUMNS)


def autoregressive_rates(record: dict[str, Any]) -> dict[str, float]:
    """Decode tokens/s of vLLM's autoregressive mode, by nominal length."""
    rates = figures_of(on_shared_prompts(pd.DataFrame(record["rows"])))[f"rate {THEIRS}"]
    return {f"{tokens // 1000}K": rate for tokens, rate in rates.items()}


def on_shared_prompts(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the prompts that every way to decode has answered."""
    answered = rows.groupby(["data", "tokens", "sample"])["method"].transform("nunique")
    return rows[answered == rows["method"].nunique()]


def figures_of(rows: pd.DataFrame) -> pd.DataFrame:
    """By prompt length: `rate` (decode tokens/s; all tokens over all seconds) and `prefill` of every method."""
    prefill = rows["one_token_s"].map(statistics.median)
    timed = rows.assign(prefill=prefill, seconds=rows["all_tokens_s"].map(statistics.median) - prefill)
    totals = timed.groupby(["tokens", "method"]).agg(
        decoded=("decoded", "sum"), seconds=("seconds", "sum"), prefill=("prefill", "mean")
    )
    totals["rate"] = totals["decoded"] / totals["seconds"]
    wide = totals[["rate", "prefill"]].unstack()
    wide.columns = [f"{figure} {method}" for figure, method in wide.columns]
    best = {
        whose: wide[[name for name in wide if name.startswith(f"rate {whose}_")]].max(axis="columns")
        for whose in ("ours", "vllm")
    }
    return wide.assign(lead=best["ours"] / best["vllm"]).rename_axis("prompt tokens")
