"""Tables from what `bench_gpu.py` wrote: results/<gpu>/bench.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from beside_paper import markdown
from gpu_figures import CAPTURED, EAGER, SPECEXTEND, STANDARD, greedy, rates


def gpu_reports(results: Path) -> Iterator[str]:
    """A section per GPU: decoding by length, then what a round costs, against the bytes it cannot avoid."""
    for path in sorted(results.glob("*/bench.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = greedy(record)
        if not rows or "stages" not in record:
            continue
        shape, versions = record["shape"], record["environment"]
        yield "\n\n".join(
            (
                f"One {record['gpu']}, {record['dtype']}, batch 1, torch {versions['torch']}. The bundled pair widened "
                f"to {shape['layers']} layers of {shape['hidden']} and to the shape of Vicuna-68M: it computes the "
                "bundled pair's tokens at the cost of large weights; none of that size were loaded. Decode tokens/s, "
                f"temperature 0, {prompts(rows)} prompts per length; standard has the same kernels and graphs, and "
                "differs in the draft's cache alone.",
                markdown(decoding(rows)),
                equality(rows),
                "Milliseconds of the steps, 64 tree slots, ten draft levels; the floor is one pass over weights and "
                "cache at the bandwidth measured beside them.",
                markdown(stages(record["stages"])),
            )
        )


def decoding(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """By length: tokens/s of every method, accepted drafts, and what SpecExtend gains."""
    rate = rates(rows)
    accepted = pd.DataFrame(rows).pivot_table(index="tokens", columns="method", values="accepted_per_round")
    table = pd.DataFrame(
        {
            "AR, Hugging Face": rate[EAGER].map("{:.0f}".format),
            "AR, ours": rate[CAPTURED].map("{:.0f}".format),
            "standard": rate[STANDARD].map("{:.0f}".format),
            "SpecExtend": rate[SPECEXTEND].map("{:.0f}".format),
            "accepted/round, standard → SpecExtend": [
                f"{of[STANDARD]:.2f} → {of[SPECEXTEND]:.2f}" for _, of in accepted.iterrows()
            ],
            "SpecExtend over AR, ours": (rate[SPECEXTEND] / rate[CAPTURED]).map("{:.2f}".format),
            "over standard": (rate[SPECEXTEND] / rate[STANDARD]).map("{:.2f}".format),
        }
    )
    return table.rename_axis("prompt tokens")


def equality(rows: list[dict[str, Any]]) -> str:
    """How many outputs are autoregressive decoding's, and how near the tie was where they part."""
    compared = [row for row in rows if row["method"] in (STANDARD, SPECEXTEND)]
    parted = [row for row in compared if row["first_difference"] is not None]
    where = "; ".join(
        f"{row['method']}, {row['data']} at {row['tokens']}: token {row['first_difference']}, {row['gap']:.4f}"
        for row in parted
    )
    line = f"Equality: {len(compared) - len(parted)} of {len(compared)} outputs are our AR's, token for token"
    return (
        f"{line}; the others part where the two highest logits are this far apart: {where}." if parted else f"{line}."
    )


def stages(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """By length: what each captured step takes."""
    names = {
        "byte_floor_ms": "byte floor", "autoregressive_ms": "AR token", "verify_ms": "verify", "draft_ms": "draft tree",
        "accept_ms": "accept, compact", "refresh_ms": "refresh", "round_ms": "whole round",
    }  # fmt: skip
    frame = pd.DataFrame(rows).set_index("tokens")[list(names)].rename(columns=names)
    return frame.map("{:.2f}".format).rename_axis("prompt tokens")


def prompts(rows: list[dict[str, Any]]) -> int:
    """The fewest prompts of a length."""
    return min(pd.Series([row["tokens"] for row in rows if row["method"] == SPECEXTEND]).value_counts())
