"""Figures out of what `bench_gpu.py` measured: rates by length and method, and a flat summary by name."""

from __future__ import annotations

from typing import Any

import pandas as pd

EAGER, CAPTURED = "autoregressive Hugging Face", "autoregressive captured"
STANDARD, SPECEXTEND = "standard captured", "specextend"
OTHERS = {"ar_graph": CAPTURED, "ar_eager": EAGER, "standard": STANDARD}
PROMPT = ["data", "tokens", "temperature", "sample"]
STAGES = {  # of a row of `stages`, by their names in the summary
    "verify": "verify", "autoregressive": "ar_graph", "round": "round", "draft": "draft_tree", "refresh": "refresh",
    "byte_floor": "byte_floor",
}  # fmt: skip


def rates(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Decode tokens/s by prompt length and method: tokens over time of all prompts.

    Hugging Face's rows are the median of a step, and each weighs one token.
    """
    return _rates(_timed(rows)).unstack()


def gains(rows: list[dict[str, Any]], other: str) -> pd.Series:
    """SpecExtend's decode tokens/s over those of `other`, by prompt length, on the prompts that both decoded."""
    frame = _timed(rows)
    frame = frame[frame["method"].isin([SPECEXTEND, other])]
    both = frame.groupby(PROMPT)["method"].transform("nunique") == 2
    found = _rates(frame[both]).unstack().reindex(columns=[SPECEXTEND, other])
    return found[SPECEXTEND] / found[other]


def numbered(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows with the number of their prompt as `sample`: the first of a data set, length and temperature is 0."""
    frame = pd.DataFrame(rows)
    order = frame.groupby(["data", "tokens", "temperature", "method"]).cumcount()
    return frame.assign(sample=frame["sample"].fillna(order).astype(int) if "sample" in frame else order)


def _timed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = numbered(rows).dropna(subset="decode_tokens_per_s")
    decoded = frame["new_tokens"] - 1 if "new_tokens" in frame else pd.Series(float("nan"), frame.index)
    decoded = decoded.fillna(1.0)  # the first of a prompt's new tokens comes out of the prefill
    return frame.assign(decoded=decoded, seconds=decoded / frame["decode_tokens_per_s"])


def _rates(frame: pd.DataFrame) -> pd.Series:
    totals = frame.groupby(["tokens", "method"])[["decoded", "seconds"]].sum()
    return totals["decoded"] / totals["seconds"]


def greedy(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `decode` at temperature 0."""
    return [row for row in record.get("decode", []) if row["temperature"] == 0]


def summary(record: dict[str, Any]) -> dict[str, float]:
    """The figures that are compared between machines and versions, flat; those of the parts that were measured."""
    found = {kind.replace("_tb_s", "_bandwidth_tb_s"): rate for kind, rate in record.get("bandwidth", {}).items()}
    for row in record.get("kernels", []):
        if row["slots"] == 64 and "bandwidth" in record:
            found[f"hta_bandwidth_fraction_{short(row['tokens'])}"] = row["tb_s"] / found["read_bandwidth_tb_s"]
    for row in record.get("prefill", []):
        if row["tokens"] == 16000:
            found |= {"prefill_s_16k": row["target_s"], "prefill_hf_s_16k": row["hugging_face_sdpa_s"]}
            found["prefill_draft_ms_16k"] = 1e3 * row["draft_s"]
    for row in record.get("stages", []):
        found |= {f"{name}_ms_{short(row['tokens'])}": row[f"{stage}_ms"] for stage, name in STAGES.items()}
        if row["tokens"] == 16000:
            found |= {"accept_ms": row["accept_ms"], "draft_tree_ms_68m": row["draft_ms"]}
            found["peak_extra_gb"] = row["peak_extra_gb"]
    for row in record.get("eagle", []):
        found[f"draft_tree_ms_{row['head']}"] = row["stages"]["draft_ms"]
    return found | decode_summary(record)


def decode_summary(record: dict[str, Any]) -> dict[str, float]:
    """SpecExtend's decode tokens/s at temperature 0 by length, and what they are of the other methods'."""
    rows = greedy(record)
    if not rows:
        return {}
    found: dict[str, float] = {}
    over = {name: gains(rows, other) for name, other in OTHERS.items()}
    for tokens, rate in rates(rows).iterrows():
        found[f"decode_tokens_per_s_{short(tokens)}"] = rate[SPECEXTEND]
        found |= {f"decode_speedup_vs_{name}_{short(tokens)}": gain[tokens] for name, gain in over.items()}
        if tokens == 16000:
            found["ar_eager_ms_16k"] = 1e3 / rate[EAGER]
    return found


def short(tokens: int) -> str:
    """A length as it stands in names: 512, 1k, 16k."""
    return f"{tokens // 1000}k" if tokens >= 1000 else str(tokens)
