"""Tables from what `bench_gpu.py` wrote: results/<gpu>/bench.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from beside_paper import markdown
from gpu_figures import CAPTURED, EAGER, PROMPT, SPECEXTEND, STANDARD, gains, greedy, numbered, rates


def gpu_reports(results: Path, *, near_ties: bool = False) -> Iterator[str]:
    """A section per GPU: decoding by length, then what a round costs, against the bytes it cannot avoid.

    Args:
        near_ties: also a table of the outputs that part from autoregressive decoding's.
    """
    for path in sorted(results.glob("*/bench.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = greedy(record)
        if not rows or "stages" not in record:
            continue
        shape, versions = record["shape"], record["environment"]
        parted = [row for row in rows if row.get("first_difference") is not None]
        sections = [
            f"One {record['gpu']}, {record['dtype']}, batch 1, torch {versions['torch']}. The bundled pair widened "
            f"to {shape['layers']} layers of {shape['hidden']} and to the shape of Vicuna-68M: it computes the "
            "bundled pair's tokens at the cost of large weights; none of that size were loaded. Decode tokens/s, "
            f"temperature 0, {prompts(rows, SPECEXTEND)} prompts per length (Hugging Face's: {prompts(rows, EAGER)}); "
            "standard has the same kernels and graphs, and differs in the draft's cache alone.",
            markdown(decoding(rows)),
            equality(rows),
            *sampled_tables(record["decode"]),
            "Milliseconds of the steps, 64 tree slots, ten draft levels; the floor is one pass over weights and "
            "cache at the bandwidth measured beside them.",
            markdown(stages(record["stages"])),
        ]
        if near_ties and parted:
            sections += [
                "Where outputs part, and how far apart the two highest logits are there:",
                markdown(ties(parted)),
            ]
        yield "\n\n".join(sections)


def sampled_tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The decode table of every other temperature than 0."""
    for temperature in sorted({row["temperature"] for row in rows} - {0}):
        yield f"The same at temperature {temperature:g}:"
        yield markdown(decoding([row for row in rows if row["temperature"] == temperature]))


def decoding(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """By length: tokens/s of every method, accepted drafts, and what SpecExtend gains."""
    rate = rates(rows)
    pairs = numbered(rows).pivot(index=PROMPT, columns="method", values="accepted_per_round")[[STANDARD, SPECEXTEND]]
    accepted = pairs.dropna().groupby("tokens").mean().reindex(rate.index)
    table = pd.DataFrame(
        {
            **({"AR, Hugging Face": rate[EAGER].map("{:.0f}".format)} if EAGER in rate else {}),
            "AR, ours": rate[CAPTURED].map("{:.0f}".format),
            "standard": rate[STANDARD].map("{:.0f}".format),
            "SpecExtend": rate[SPECEXTEND].map("{:.0f}".format),
            "accepted/round, standard → SpecExtend": [
                f"{of[STANDARD]:.2f} → {of[SPECEXTEND]:.2f}" for _, of in accepted.iterrows()
            ],
            "SpecExtend over AR, ours": gains(rows, CAPTURED).map("{:.2f}".format),
            "over standard": gains(rows, STANDARD).map("{:.2f}".format),
        }
    )
    return table.rename_axis("prompt tokens")


def equality(rows: list[dict[str, Any]]) -> str:
    """How many outputs are autoregressive decoding's, and how near the tie was where they part."""
    gaps = [row.get("gap") for row in rows if row["method"] in (STANDARD, SPECEXTEND)]
    parted = [gap for gap in gaps if gap is not None]
    line = f"Equality: {len(gaps) - len(parted)} of {len(gaps)} outputs are our AR's, token for token"
    if not parted:
        return f"{line}."
    return f"{line}; the others part at a near-tie, where the two highest logits are at most {max(parted):.4f} apart."


def ties(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Method, prompt, output position and gap of the outputs that part."""
    frame = pd.DataFrame(rows)[["method", "data", "tokens", "first_difference", "gap"]]
    frame["gap"] = frame["gap"].map("{:.4f}".format)
    names = {"data": "data set", "tokens": "prompt tokens", "first_difference": "output token", "gap": "logit gap"}
    return frame.rename(columns=names).set_index("method")


def stages(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """By length: what each captured step takes."""
    names = {
        "byte_floor_ms": "byte floor", "autoregressive_ms": "AR token", "verify_ms": "verify", "draft_ms": "draft tree",
        "accept_ms": "accept, compact", "refresh_ms": "refresh", "round_ms": "whole round",
    }  # fmt: skip
    frame = pd.DataFrame(rows).set_index("tokens")[list(names)].rename(columns=names)
    return frame.map("{:.2f}".format).rename_axis("prompt tokens")


def prompts(rows: list[dict[str, Any]], method: str) -> int:
    """The fewest prompts of a length."""
    return min(pd.Series([row["tokens"] for row in rows if row["method"] == method]).value_counts())
