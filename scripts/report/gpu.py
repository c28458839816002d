"""A table and a flat summary of what `scripts.bench.gpu` measured: results/<gpu>/bench.json."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.report.markdown import Column, lines_of, table_of
from scripts.report.paper import paper
from scripts.report.records import attempt, read_documents

STEPS = {  # of a row of `steps`, by their names in the summary
    "verify": "verify", "autoregressive": "ar_graph", "round": "round", "draft": "draft_tree", "refresh": "refresh",
    "byte_floor": "byte_floor",
}  # fmt: skip
SHOWN = 1000, 16000  # prompt tokens
PREFILL_COLUMNS = [
    Column("ours", "target_s", 3),
    Column("ours, dense attention (standard)", "standard_s", 3),
    Column("transformers, sdpa", "hugging_face_sdpa_s", 3),
    Column("transformers, eager", "hugging_face_eager_s", 3),
]
STEP_COLUMNS = [
    Column("byte floor", "byte_floor_ms"),
    Column("AR token", "autoregressive_ms"),
    Column("verify", "verify_ms"),
    Column("draft tree", "draft_ms"),
    Column("accept, compact", "accept_ms"),
    Column("refresh", "refresh_ms"),
    Column("whole round", "round_ms"),
]


def reports(results: Path) -> list[str]:
    """All of it."""
    made = (step_reports, prefill_reports, slot_reports, policy_reports)
    return [section for make in made for section in make(results)]


def step_reports(results: Path) -> list[str]:
    """What the steps of a round cost, for every GPU on which they were timed."""
    return _sections(results, _steps)


def slot_reports(results: Path) -> list[str]:
    """What a verification costs by its slots, for every GPU on which that was timed."""
    return _sections(results, _slots)


def policy_reports(results: Path) -> list[str]:
    """What deciding about trees costs, for every GPU on which that was timed."""
    return _sections(results, _policy)


def prefill_reports(results: Path) -> list[str]:
    """What reading a prompt takes, for every GPU on which dense attention was timed, too."""
    return _sections(results, _prefill)


def _sections(results: Path, make: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    made = (attempt(path, partial(make, record)) for path, record in read_documents(results, "bench.json"))
    return ["\n\n".join(section) for section in made if section]


def _about(record: dict[str, Any]) -> str:
    shape = record["shape"]
    return (
        f"One {record['gpu']}, {record['dtype']}, batch 1, torch {record['environment']['torch']}. The bundled pair "
        f"widened to {shape['layers']} layers of {shape['hidden']} and to the shape of Vicuna-68M: it computes the "
        "bundled pair's tokens at the cost of large weights; none of that size were loaded."
    )


def _slots(record: dict[str, Any]) -> list[str]:
    slots = pd.DataFrame(record.get("slots", []))
    if slots.empty:
        return []
    shape, table = record["shape"], slots.pivot(index="tokens", columns="slots", values="ms").map("{:.2f}".format)
    return [
        f"One {record['gpu']}, {record['dtype']}, the bundled pair widened to {shape['layers']} layers of "
        f"{shape['hidden']}: milliseconds of a verification by its slots, which priced trees choose among.",
        lines_of(table.rename(columns=str).to_dict(orient="index"), "prompt tokens"),
    ]


def _policy(record: dict[str, Any]) -> list[str]:
    if not record.get("policy"):
        return []
    lines = {
        str(row["tokens"]): {
            "as a fixed bound": f"{row['fixed_round_ms']:.2f}",
            "as a decision": f"{row['decided_round_ms']:.2f}",
            "tokens a round": " and ".join(f"{row[f'{name}_tokens']:.2f}" for name in ("fixed", "decided")),
        }
        for row in record["policy"]
    }
    return [
        f"One {record['gpu']}, the same pair: milliseconds of a round with the paper's tree in every round, at "
        f"temperature 0.8, in turns, medians of {len(record['policy'][0]['turns'])} answers of 256 tokens. What "
        "thinking about trees costs is in the second; levels that nobody wants are launched in the first alone.",
        lines_of(lines, "prompt tokens"),
    ]


def _prefill(record: dict[str, Any]) -> list[str]:
    rows = pd.DataFrame(record.get("prefill", []))
    if "standard_s" not in rows:
        return []
    return [
        f"One {record['gpu']}, the same target: seconds to read a prompt. Standard's dense attention is the baseline "
        "of most tables; it makes as many passes over its scores as transformers' eager attention.",
        table_of(rows.set_index("tokens").rename_axis("prompt tokens"), PREFILL_COLUMNS),
    ]


def _beside_table_7(steps: list[dict[str, Any]]) -> list[str]:
    """The paper's latencies at 16K with ours, where that length was measured."""
    says = paper()["table7_latency_ms_16K"]
    return [
        f"Beside table 7 (16K, A100): a target forward takes {says['target_forward']} ms and with retrieval "
        f"{says['target_forward_with_retrieval']}, a draft forward {says['draft_forward']}, an update of the working "
        f"cache {says['retrieval_cache_update']}; here a verification takes {ours['verify_ms']:.2f}, a level of the "
        f"draft's tree {ours['draft_ms'] / 10:.2f}, retrieval and update together {ours['refresh_ms']:.2f}, every "
        "fourth round."
        for ours in steps
        if ours["tokens"] == 16000
    ]


def _steps(record: dict[str, Any]) -> list[str]:
    steps = [step for step in steps_of(record) if step["tokens"] in SHOWN]
    if not steps:
        return []
    return [
        f"{_about(record)} Milliseconds of the steps, 64 tree slots, ten draft levels; the floor is one pass over "
        "weights and cache at the bandwidth measured beside them.",
        table_of(pd.DataFrame(steps).set_index("tokens").rename_axis("prompt tokens"), STEP_COLUMNS),
        *_beside_table_7(steps),
    ]


def steps_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return record.get("steps") or record.get("stages") or []  # their name in older files


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
    return found


def short(tokens: int) -> str:
    """A length as it stands in names: 512, 1k, 16k."""
    return f"{tokens // 1000}k" if tokens >= 1000 else str(tokens)
