"""Tables and a flat summary of what `scripts.bench.gpu` measured: results/<gpu>/bench.json.

Older files also hold decoding rates (`decode`); today they come from eval_classic.py with `--widen`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.report.markdown import Column, table_of
from scripts.report.records import attempt, read_documents

EAGER, CAPTURED = "autoregressive Hugging Face", "autoregressive captured"
STANDARD, SPECEXTEND = "standard captured", "specextend"
OTHERS = {"ar_graph": CAPTURED, "ar_eager": EAGER, "standard": STANDARD}
PROMPT = ["data", "tokens", "temperature", "sample"]
STEPS = {  # of a row of `steps`, by their names in the summary
    "verify": "verify", "autoregressive": "ar_graph", "round": "round", "draft": "draft_tree", "refresh": "refresh",
    "byte_floor": "byte_floor",
}  # fmt: skip
STEP_COLUMNS = [
    Column("byte floor", "byte_floor_ms"),
    Column("AR token", "autoregressive_ms"),
    Column("verify", "verify_ms"),
    Column("draft tree", "draft_ms"),
    Column("accept, compact", "accept_ms"),
    Column("refresh", "refresh_ms"),
    Column("whole round", "round_ms"),
]
RATE_COLUMNS = [
    Column("AR, Hugging Face", EAGER, 0),
    Column("AR, ours", CAPTURED, 0),
    Column("standard", STANDARD, 0),
    Column("SpecExtend", SPECEXTEND, 0),
    Column("accepted/round, standard → SpecExtend", "accepted"),
    Column("SpecExtend over AR, ours", "over AR"),
    Column("over standard", "over standard"),
]
HEADLINE = (1000, 4000, 16000)  # prompt tokens
HEADLINE_COLUMNS = [Column("temperature", "temperature", 1), *RATE_COLUMNS[1:4], *RATE_COLUMNS[5:]]
TIE_COLUMNS = [
    Column("data set", "data"),
    Column("prompt tokens", "tokens", 0),
    Column("output token", "first_difference", 0),
    Column("logit gap", "gap", 4),
]


def gpu_reports(results: Path, *, near_ties: bool = False) -> Iterator[str]:
    """A section per GPU: decoding by length where it was measured, then what a round costs.

    Args:
        near_ties: also a table of the outputs that part from autoregressive decoding's.
    """
    for path, record in read_documents(results, "bench.json"):
        section = attempt(path, lambda record=record: "\n\n".join(_section(record, near_ties)))
        if section:
            yield section


def headlines(results: Path) -> Iterator[str]:
    """For each GPU on which decoding was measured: what is decoded a second, at a few lengths and all temperatures."""
    for path, record in read_documents(results, "bench.json"):
        found = record.get("decode") and attempt(path, lambda record=record: "\n\n".join(_headline(record)))
        if found:
            yield found


def _headline(record: dict[str, Any]) -> Iterator[str]:
    rows, tables = record["decode"], []
    yield f"{_about(record)} Decode tokens/s, {_prompts(greedy(record), SPECEXTEND)} prompts per row:"
    for temperature in sorted({row["temperature"] for row in rows}):
        of_temperature = [row for row in rows if row["temperature"] == temperature]
        table = rates(of_temperature)
        table["over AR"], table["over standard"] = gains(of_temperature, CAPTURED), gains(of_temperature, STANDARD)
        table.insert(0, "temperature", temperature)
        tables.append(table.loc[table.index.intersection(HEADLINE)])
    whole = pd.concat(tables).rename_axis("prompt tokens").sort_index(kind="stable")
    yield table_of(whole, [one for one in HEADLINE_COLUMNS if one.source in whole])


def _about(record: dict[str, Any]) -> str:
    shape = record["shape"]
    return (
        f"One {record['gpu']}, {record['dtype']}, batch 1, torch {record['environment']['torch']}. The bundled pair "
        f"widened to {shape['layers']} layers of {shape['hidden']} and to the shape of Vicuna-68M: it computes the "
        "bundled pair's tokens at the cost of large weights; none of that size were loaded."
    )


def _section(record: dict[str, Any], near_ties: bool) -> Iterator[str]:
    rows, steps = greedy(record), steps_of(record)
    if not steps:
        return
    if not rows:
        yield _about(record)
    else:
        yield (
            f"{_about(record)} Decode tokens/s, temperature 0, {_prompts(rows, SPECEXTEND)} prompts per length "
            f"(Hugging Face's: {_prompts(rows, EAGER)}); standard has the same kernels and graphs, and differs in the "
            "draft's cache alone."
        )
        yield decoding(rows)
        yield equality(rows)
        for temperature in sorted({row["temperature"] for row in record["decode"]} - {0}):
            yield f"The same at temperature {temperature:g}:"
            yield decoding([row for row in record["decode"] if row["temperature"] == temperature])
    yield (
        "Milliseconds of the steps, 64 tree slots, ten draft levels; the floor is one pass over weights and "
        "cache at the bandwidth measured beside them."
    )
    yield table_of(pd.DataFrame(steps).set_index("tokens").rename_axis("prompt tokens"), STEP_COLUMNS)
    parted = [row for row in rows if row.get("first_difference") is not None]
    if near_ties and parted:
        yield "Where outputs part, and how far apart the two highest logits are there:"
        yield table_of(pd.DataFrame(parted).set_index("method"), TIE_COLUMNS)


def decoding(rows: list[dict[str, Any]]) -> str:
    """By length: tokens/s of every method, accepted drafts, and what SpecExtend gains."""
    table = rates(rows)
    pairs = numbered(rows).pivot(index=PROMPT, columns="method", values="accepted_per_round")[[STANDARD, SPECEXTEND]]
    means = pairs.dropna().groupby("tokens").mean().reindex(table.index)
    table["accepted"] = [f"{before:.2f} → {after:.2f}" for before, after in means.values]
    table["over AR"], table["over standard"] = gains(rows, CAPTURED), gains(rows, STANDARD)
    return table_of(table.rename_axis("prompt tokens"), [one for one in RATE_COLUMNS if one.source in table])


def equality(rows: list[dict[str, Any]]) -> str:
    """How many outputs are autoregressive decoding's, and how near the tie was where they part."""
    gaps = [row.get("gap") for row in rows if row["method"] in (STANDARD, SPECEXTEND)]
    parted = [gap for gap in gaps if gap is not None]
    line = f"Equality: {len(gaps) - len(parted)} of {len(gaps)} outputs are our AR's, token for token"
    if not parted:
        return f"{line}."
    return f"{line}; the others part at a near-tie, where the two highest logits are at most {max(parted):.4f} apart."


def _prompts(rows: list[dict[str, Any]], method: str) -> int:
    """The fewest prompts of a length."""
    return min(pd.Series([row["tokens"] for row in rows if row["method"] == method]).value_counts(), default=0)


# --- figures --------------------------------------------------------------------------------------------------------


def steps_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return record.get("steps") or record.get("stages") or []  # their name in older files


def greedy(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in record.get("decode", []) if row["temperature"] == 0]


def rates(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Decode tokens/s by prompt length and method: tokens over time of all prompts.

    Hugging Face's rows are the median of a step, and each weighs one token.
    """
    return _rates(_timed(rows))


def gains(rows: list[dict[str, Any]], other: str) -> pd.Series:
    """SpecExtend's decode tokens/s over those of `other`, by prompt length, on the prompts that both decoded."""
    frame = _timed(rows)
    frame = frame[frame["method"].isin([SPECEXTEND, other])]
    both = frame.groupby(PROMPT)["method"].transform("nunique") == 2
    found = _rates(frame[both]).reindex(columns=[SPECEXTEND, other])
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


def _rates(frame: pd.DataFrame) -> pd.DataFrame:
    totals = frame.groupby(["tokens", "method"])[["decoded", "seconds"]].sum()
    return (totals["decoded"] / totals["seconds"]).unstack()


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
    for row in steps_of(record):
        found |= {f"{name}_ms_{short(row['tokens'])}": row[f"{step}_ms"] for step, name in STEPS.items()}
        if row["tokens"] == 16000:
            found |= {"accept_ms": row["accept_ms"], "draft_tree_ms_68m": row["draft_ms"]}
            found["peak_extra_gb"] = row["peak_extra_gb"]
    for row in record.get("eagle", []):
        found[f"draft_tree_ms_{row['head']}"] = (row.get("steps") or row["stages"])["draft_ms"]
    return found | _decode_summary(greedy(record))


def _decode_summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """SpecExtend's decode tokens/s at temperature 0 by length, and what they are of the other methods'."""
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
