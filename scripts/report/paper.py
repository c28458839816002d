"""Our figures beside the paper's (`results/paper/tables.json`), table by table, as Markdown."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from readings import CACHE_NAMES, analysis_parts, entropy_shares, needle_shares
from shared import on_shared

PAPER = Path(__file__).resolve().parents[1] / "results" / "paper" / "tables.json"
DATA = {"govreport": "GovReport", "pg19": "PG-19", "booksum": "BookSum"}
TABLE_3 = {
    "autoregressive": "FlashDecoding",
    "triforce": "TriForce",
    "magicdec": "MagicDec",
    "standard": "Standard",
    "specextend": "Standard+SpecExtend",
}
TABLE_4 = {
    "standard": "Standard",
    "fa": "Standard+FA",
    "hta": "Standard+HTA",
    "streaming": "Standard+StreamingLLM",
    "cmr": "Standard+CMR",
}
PERIOD = "retrieval_every_n_steps"  # as table 8 calls --retrieve_every_n_steps
TABLE_7 = {
    "target_forward": "target forward (verification)",
    "target_forward_with_retrieval": "the same with retrieval",
    "draft_forward": "draft forward",
    "retrieval_cache_update": "update of the working cache",
}


@cache
def paper() -> dict[str, Any]:
    return json.loads(PAPER.read_text(encoding="utf-8"))


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table with the named index as its first column."""
    header = [table.index.name, *table.columns]
    lines = [header, ["---:"] * len(header)]
    lines += [[length, *cells] for length, cells in zip(table.index, table.fillna("").values, strict=True)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def figure(value: float | None, digits: int = 2) -> str:
    return "" if value is None or pd.isna(value) else f"{value:,.{digits}f}"


# --- the evaluations: tables 2 to 5 ---------------------------------------------------------------------------------


def tables_of(rows: pd.DataFrame) -> list[str]:
    """The paper's tables that correspond to what was measured on one data set and temperature under one setting.

    Args:
        rows: as `make_tables.read_results` gives them.
    """
    data = DATA.get(rows["data"].iloc[0])
    if rows["data"].iloc[0] == "aime24":
        return [long_answers(rows)]
    if data is None or rows["temperature"].iloc[0] != 0:
        return []
    return [table for table in (main_table(rows, data), rivals(rows, data), ablation(rows, data)) if table]


def main_table(rows: pd.DataFrame, data: str) -> str:
    """Tables 2, 5 and 6: standard and SpecExtend."""
    name, printed = _main_rows(rows.iloc[0], data)
    rows = on_shared(rows, ("standard", "specextend"))
    ours = rows.set_index(["method", "length"])
    if not printed or rows["method"].nunique() < 2:
        return ""
    lines = {}
    for length in rows["length"].unique():
        theirs = {row["specextend"]: row for row in printed if row["length"] == length}
        if not theirs:
            continue
        before, after = theirs.get(False, {}), theirs.get(True, {})
        lines[length] = {
            "accepted: paper": _arrow(before.get("tau"), after.get("tau")),
            "accepted: ours": _arrow(*_ours(ours, length, "avg_accept_length")),
            "end-to-end speed-up: paper": _arrow(before.get("speedup"), after.get("speedup")),
            "end-to-end speed-up: ours": _arrow(*_ours(ours, length, "speedup")),
        }
    note = f"Beside the paper's {name}; its 1x is naive autoregressive decoding on one A100 80GB, ours our own loop:"
    return f"{note}\n\n{_lines(lines)}" if lines else ""


def _main_rows(run: pd.Series, data: str) -> tuple[str, list[dict]]:
    """Rows of the same target and kind of draft, Vicuna-7B's for a pair that the paper does not have."""
    head = "eagle" in run["draft"].lower()
    if run["model"] == "llama31_8b" and data == "PG-19":
        return "table 6 (Llama-3.1-8B, EAGLE)", paper()["table6_llama31_8b_eagle_pg19_long"]
    if run["model"] == "llama31_8b":
        rows = next(rows for name, rows in paper().items() if name.startswith("table5"))
        rows = [row for row in rows if data == "GovReport" and row["draft"] == "eagle3"]
        return "table 5 (Llama-3.1-8B, EAGLE-3)", rows
    target = run["model"] if run["model"] in ("vicuna_7b", "longchat_7b") else "vicuna_7b"
    rows = [
        row
        for row in paper()["table2_main"]
        if (row["dataset"], row["target"]) == (data, target) and (row["draft"] == "eagle") == head
    ]
    return f"table 2 ({target}, {rows[0]['draft']})" if rows else "table 2", rows


def long_answers(rows: pd.DataFrame) -> str:
    """Figure 6: AIME-24 problems, long answers; R1-Distill-Llama-8B with EAGLE-3 in the paper."""
    printed = paper()["figure6_aime24_r1_distill_llama_8b_eagle3"]
    rows = on_shared(rows, ("standard", "specextend"))
    lines = {}
    for method, theirs in (("standard", "eagle3"), ("specextend", "eagle3_specextend")):
        gain = printed[theirs]["tokens_per_s"] / printed["naive_ar_tokens_per_s"]
        lines[method] = {"accepted: paper": figure(printed[theirs]["tau"]), "speed-up: paper": figure(gain)}
        for _, row in rows[rows["method"] == method].iterrows():
            lines[method] |= {
                "accepted: ours": figure(row["avg_accept_length"]),
                "speed-up: ours": figure(row["speedup"]),
            }
    return f"Beside figure 6 (R1-Distill-Llama-8B, EAGLE-3, answers of up to 32K tokens):\n\n{_lines(lines, 'method')}"


def rivals(rows: pd.DataFrame, data: str) -> str:
    """Table 3: end-to-end speed-up of other methods over naive autoregressive decoding."""
    rows = on_shared(rows, TABLE_3.keys() | {"autoregressive_hf"})
    ours = rows.set_index(["method", "length"])["speedup"].astype(float)  # each over our loop beside it
    if "autoregressive_hf" not in ours.index or not {"triforce", "magicdec"} & set(rows["method"]):
        return ""
    naive = ours["autoregressive_hf"]
    printed = {
        (row["method"], row["length"]): row["speedup"]
        for row in paper()["table3_methods_vicuna_7b"]
        if row["dataset"] == data
    }
    lines = {
        length: {
            method: f"{figure(printed.get((theirs, length)))} / {figure(ours[method, length] / naive[length])}"
            for method, theirs in TABLE_3.items()
            if (method, length) in ours.index
        }
        for length in naive.index
        if (TABLE_3["standard"], length) in printed
    }
    return f"Beside table 3, end-to-end speed-up over Hugging Face's eager decoding, paper / ours:\n\n{_lines(lines)}"


def ablation(rows: pd.DataFrame, data: str) -> str:
    """Table 4: each part alone on top of standard."""
    if data != "GovReport" or not set(TABLE_4) <= set(rows["method"]):
        return ""
    printed = {(row["setting"], row["length"]): row for row in paper()["table4_ablation_govreport_vicuna_7b_68m"]}
    rows = on_shared(rows, TABLE_4)
    ours = rows.set_index(["method", "length"])
    lines = {}
    for method, theirs in TABLE_4.items():
        for length in rows["length"].unique():
            if (theirs, length) not in printed or (method, length) not in ours.index:
                continue
            paper_speed = printed[theirs, length]["tokens_per_s"] / printed["Standard", length]["tokens_per_s"]
            base = ours["speedup"].get(("standard", length))
            our_speed = ours.loc[(method, length), "speedup"] / base if base else None
            cell = (
                f"{figure(printed[theirs, length]['tau'])} / {figure(ours.loc[(method, length), 'avg_accept_length'])}"
            )
            lines.setdefault(theirs, {})[f"{length}: accepted"] = cell
            lines[theirs][f"{length}: speed"] = f"{figure(paper_speed)} / {figure(our_speed)}"
    note = "Beside table 4, each part alone; accepted per round, and end-to-end speed over standard; paper / ours:"
    return f"{note}\n\n{_lines(lines, 'setting')}"


def _ours(ours: pd.DataFrame, length: str, name: str) -> tuple[float | None, float | None]:
    return tuple(ours[name].get((method, length)) for method in ("standard", "specextend"))


def _arrow(before: float | None, after: float | None) -> str:
    return f"{figure(before) or '–'} → {figure(after) or '–'}"


def _lines(lines: dict[str, dict[str, str]], name: str = "length") -> str:
    return markdown(pd.DataFrame.from_dict(lines, orient="index").rename_axis(name))


# --- needles: table 1 -----------------------------------------------------------------------------------------------


def needle_table(content: dict[str, Any]) -> str:
    """Table 1: accuracy and perplexity on the needle's tokens, and what Cross-model Retrieval gains."""
    shares = needle_shares(content["records"], ["length"])
    accuracy = shares.pivot(index="cache", columns="length", values="accuracy")
    perplexity = shares.pivot(index="cache", columns="length", values="perplexity")
    lengths = list(shares["length"].unique())
    printed = dict(zip(("full", "streaming", "cmr", "target_retrieval"), paper()["table1_needle"]["rows"], strict=True))
    lines = {}
    for kind, name in CACHE_NAMES.items():
        _, _, their_perplexity, their_accuracy = printed.get(kind, (None,) * 4)
        lines[name] = {"paper: accuracy": figure(their_accuracy, 3), "paper: perplexity": figure(their_perplexity)}
        lines[name] |= {f"ours, {length}: accuracy": figure(accuracy.loc[kind, length], 3) for length in lengths}
        lines[name] |= {f"{length}: perplexity": figure(perplexity.loc[kind, length]) for length in lengths}
    gains = [
        f"{length}: {_times(accuracy[length], 'streaming')}, {_times(accuracy[length], 'full')}" for length in lengths
    ]
    said = "Accuracy of Cross-model Retrieval over StreamingLLM's, and over the full cache's, at "
    return f"{_lines(lines, 'cache')}\n\n{said}{'; '.join(gains)}."


def _times(accuracy: pd.Series, other: str) -> str:
    return f"× {accuracy['cmr'] / accuracy[other]:.1f}" if accuracy[other] else "× ∞ (none right)"


# --- analyses: figure 3, tables 7 and 8, equation 1 -----------------------------------------------------------------


def analysis_tables(content: dict[str, Any]) -> list[str]:
    tables = {
        "divergence": divergence_table,
        "entropy": entropy_table,
        "refresh": refresh_table,
        "sweep": sweep_table,
        "equation1": equation_table,
    }
    parts = analysis_parts(content)
    return [text for part, table in tables.items() if part in parts for text in table(parts[part])]


def divergence_table(rows: pd.DataFrame) -> list[str]:
    kinds = [kind for kind in CACHE_NAMES if f"{kind}.kl" in rows]
    means = rows.groupby("length", sort=False)[
        [f"{kind}.{name}" for kind in kinds for name in ("kl", "same_argmax")]
    ].mean()
    lines = {
        length: {CACHE_NAMES[kind]: f"{row[f'{kind}.kl']:.2f} ({row[f'{kind}.same_argmax']:.0%})" for kind in kinds}
        for length, row in means.iterrows()
    }
    return ["KL divergence from the target in nats, and share of equal argmax, by position (figure 3):", _lines(lines)]


def entropy_table(rows: pd.DataFrame) -> list[str]:
    shares = entropy_shares(rows).pivot(index="method", columns="group", values="accepted")
    lines = {
        method: {
            "all": f"{row.mean():.2f}",
            "easy: nine tenths": f"{row[:-1].mean():.2f}",
            "hard: top tenth": f"{row.iloc[-1]:.2f}",
        }
        for method, row in shares.iterrows()
    }
    return ["Share of output tokens that were accepted drafts, by the target's entropy:", _lines(lines, "method")]


def refresh_table(rows: pd.DataFrame) -> list[str]:
    rows = rows.assign(target_forward_with_retrieval=rows["target_forward"] + rows["retrieval"])
    theirs = paper()["table7_latency_ms_16K"]
    lines = {
        label: {"paper, 16K": figure(theirs[name])}
        | {f"ours, {row['length']}": figure(row[name]) for _, row in rows.iterrows()}
        for name, label in TABLE_7.items()
    }
    return ["Beside table 7, milliseconds:", _lines(lines, "step")]


def sweep_table(rows: pd.DataFrame) -> list[str]:
    """Table 8; ours also as accepted drafts, which no other work on the machine disturbs."""
    printed = paper()["table8_tokens_per_s_govreport_8K"]
    texts = [f"Beside table 8 (the paper's: Vicuna-68M, GovReport 8K; ours: {rows['length'].iloc[0]}), by parameter:"]
    for parameter, group in rows.groupby("parameter", sort=False):
        theirs = printed[PERIOD if parameter == "retrieve_every_n_steps" else parameter]["vicuna_68m"]
        means = group.groupby("value")[["accepted_per_round", "decode_tokens_per_s"]].mean()
        lines = {
            "paper: tokens/s": {str(v): figure(theirs.get(str(v))) for v in means.index},
            "ours: decode tokens/s": {str(v): figure(row["decode_tokens_per_s"], 1) for v, row in means.iterrows()},
            "ours: accepted per round": {str(v): figure(row["accepted_per_round"]) for v, row in means.iterrows()},
        }
        texts.append(_lines(lines, parameter))
    return texts


def equation_table(rows: pd.DataFrame) -> list[str]:
    means = rows.groupby(["method", "length"], sort=False)[["predicted", "measured"]].mean()
    lines: dict[str, dict[str, str]] = {}
    for (method, length), row in means.iterrows():
        lines.setdefault(length, {})[method] = f"{row['predicted']:.2f} / {row['measured']:.2f}"
    return ["Equation 1, decoding speed-up over our autoregressive loop, predicted / measured:", _lines(lines)]
