"""Our figures beside the paper's (`results/paper/tables.json`), table by table, as Markdown."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.report.analyses import CACHE_NAMES, entropy_shares, needle_shares, parts_of
from scripts.report.markdown import cell, lines_of
from scripts.report.records import PAIR, figures_of, shared

PAPER = Path(__file__).resolve().parents[2] / "results" / "paper" / "tables.json"
DATA = {"govreport": "GovReport", "pg19": "PG-19", "booksum": "BookSum"}
NAIVE = "autoregressive_hf"
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
TABLE_7 = {
    "target_forward": "target forward (verification)",
    "target_forward_with_retrieval": "the same with retrieval",
    "draft_forward": "draft forward",
    "retrieval_cache_update": "update of the working cache",
}
TABLE_8 = {"retrieve_every_n_steps": "retrieval_every_n_steps"}  # ours and the paper's name of a parameter


@cache
def paper() -> dict[str, Any]:
    return json.loads(PAPER.read_text(encoding="utf-8"))


# --- the evaluations: tables 2 to 6 and figure 6 --------------------------------------------------------------------


def tables_beside(records: pd.DataFrame) -> list[str]:
    """The paper's tables that correspond to what was measured on one data set and temperature under one setting."""
    first = records.iloc[0]
    if first["data"] == "aime24":
        return [long_answers(records)]
    data = DATA.get(first["data"])
    if data is None or first["temperature"] != 0:
        return []
    return [table for table in (main_table(records, data), rivals(records, data), ablation(records, data)) if table]


def main_table(records: pd.DataFrame, data: str) -> str:
    """Tables 2, 5 and 6: standard and SpecExtend."""
    name, printed = _main_rows(records.iloc[0], data)
    ours = _by_method(records, PAIR)
    if not printed or len(set(ours.index.get_level_values("method"))) < 2:
        return ""
    lines = {}
    for length in ours.index.unique("length"):
        theirs = {row["specextend"]: row for row in printed if row["length"] == length}
        if theirs:
            lines[length] = {
                f"{said}: {whose}": _arrow(*pair)
                for said, key, figure in (
                    ("accepted", "tau", "avg_accept_length"), ("end-to-end speed-up", "speedup", "speedup")
                )
                for whose, pair in (
                    ("paper", [theirs.get(with_it, {}).get(key) for with_it in (False, True)]),
                    ("ours", [ours[figure].get((method, length)) for method in PAIR]),
                )
            }  # fmt: skip
    note = f"Beside the paper's {name}; its 1x is naive autoregressive decoding on one A100 80GB, ours our own loop:"
    return f"{note}\n\n{lines_of(lines)}" if lines else ""


def _main_rows(run: pd.Series, data: str) -> tuple[str, list[dict]]:
    """Rows of the same target and kind of draft, Vicuna-7B's for a pair that the paper does not have."""
    if run["model"] == "llama31_8b" and data == "PG-19":
        return "table 6 (Llama-3.1-8B, EAGLE)", paper()["table6_llama31_8b_eagle_pg19_long"]
    if run["model"] == "llama31_8b":
        rows = next(rows for name, rows in paper().items() if name.startswith("table5"))
        rows = [row for row in rows if data == "GovReport" and row["draft"] == "eagle3"]
        return "table 5 (Llama-3.1-8B, EAGLE-3)", rows
    has_head = "eagle" in run["draft"].lower()
    target = run["model"] if run["model"] in ("vicuna_7b", "longchat_7b") else "vicuna_7b"
    rows = [
        row
        for row in paper()["table2_main"]
        if (row["dataset"], row["target"]) == (data, target) and (row["draft"] == "eagle") == has_head
    ]
    return f"table 2 ({target}, {rows[0]['draft']})" if rows else "table 2", rows


def long_answers(records: pd.DataFrame) -> str:
    """Figure 6: AIME-24 problems, long answers; R1-Distill-Llama-8B with EAGLE-3 in the paper."""
    printed, ours = paper()["figure6_aime24_r1_distill_llama_8b_eagle3"], _by_method(records, PAIR)
    lines = {}
    for method, theirs in zip(PAIR, ("eagle3", "eagle3_specextend"), strict=True):
        gain = printed[theirs]["tokens_per_s"] / printed["naive_ar_tokens_per_s"]
        lines[method] = {"accepted: paper": cell(printed[theirs]["tau"]), "speed-up: paper": cell(gain)}
        for _, row in ours[ours.index.get_level_values("method") == method].iterrows():
            lines[method] |= {"accepted: ours": cell(row["avg_accept_length"]), "speed-up: ours": cell(row["speedup"])}
    note = "Beside figure 6 (R1-Distill-Llama-8B, EAGLE-3, answers of up to 32K tokens):"
    return f"{note}\n\n{lines_of(lines, 'method')}"


def rivals(records: pd.DataFrame, data: str) -> str:
    """Table 3: end-to-end speed-up of other methods over naive autoregressive decoding."""
    if not {"triforce", "magicdec"} & set(records["method"]) or NAIVE not in set(records["method"]):
        return ""
    ours = _by_method(records, (*TABLE_3, NAIVE))["speedup"].astype(float)  # each over our loop beside it
    printed = {
        (row["method"], row["length"]): row["speedup"]
        for row in paper()["table3_methods_vicuna_7b"]
        if row["dataset"] == data
    }
    naive = {length: value for (method, length), value in ours.items() if method == NAIVE}
    lines = {
        length: {
            method: f"{cell(printed.get((theirs, length)))} / {cell(ours[method, length] / base)}"
            for method, theirs in TABLE_3.items()
            if (method, length) in ours.index
        }
        for length, base in naive.items()
        if (TABLE_3["standard"], length) in printed
    }
    note = "Beside table 3, end-to-end speed-up over Hugging Face's eager decoding, paper / ours:"
    return f"{note}\n\n{lines_of(lines)}" if lines else ""


def ablation(records: pd.DataFrame, data: str) -> str:
    """Table 4: each part alone on top of standard."""
    if data != "GovReport" or not set(TABLE_4) <= set(records["method"]):
        return ""
    printed = {(row["setting"], row["length"]): row for row in paper()["table4_ablation_govreport_vicuna_7b_68m"]}
    lines: dict[str, dict[str, str]] = {}
    ours = _by_method(records, tuple(TABLE_4))
    for (method, length), row in ours.iterrows():
        theirs, standard = printed.get((TABLE_4[method], length)), printed.get(("Standard", length))
        base = ours["speedup"].get(("standard", length))
        if theirs:
            accepted, speed = row["avg_accept_length"], theirs["tokens_per_s"] / standard["tokens_per_s"]
            lines.setdefault(TABLE_4[method], {}).update(
                {
                    f"{length}: accepted": f"{cell(theirs['tau'])} / {cell(accepted)}",
                    f"{length}: speed": f"{cell(speed)} / {cell(row['speedup'] / base if base else None)}",
                }
            )
    note = "Beside table 4, each part alone; accepted per round, and end-to-end speed over standard; paper / ours:"
    return f"{note}\n\n{lines_of(lines, 'setting')}" if lines else ""


def _by_method(records: pd.DataFrame, methods: tuple[str, ...]) -> pd.DataFrame:
    """Figures of `methods` on the prompts that all of them have answered, by method and length."""
    return figures_of(shared(records, methods)).set_index(["method", "length"])


def _arrow(before: float | None, after: float | None) -> str:
    return f"{cell(before) or '–'} → {cell(after) or '–'}"


# --- needles: table 1 -----------------------------------------------------------------------------------------------


def needle_table(content: dict[str, Any]) -> str:
    """Table 1: accuracy and perplexity on the needle's tokens."""
    shares = needle_shares(content["records"], ["length"])
    lengths = list(shares["length"].unique())
    ours = shares.set_index(["cache", "length"])
    printed = dict(zip(CACHE_NAMES, paper()["table1_needle"]["rows"], strict=False))  # not the target's full cache
    lines = {}
    for kind, name in CACHE_NAMES.items():
        _, _, perplexity, accuracy = printed.get(kind, (None,) * 4)
        lines[name] = {"paper: accuracy": cell(accuracy, 3), "paper: perplexity": cell(perplexity)}
        lines[name] |= {f"ours, {at}: accuracy": cell(ours["accuracy"][kind, at], 3) for at in lengths}
        lines[name] |= {f"{at}: perplexity": cell(ours["perplexity"][kind, at]) for at in lengths}
    return lines_of(lines, "cache")


def needle_gains(content: dict[str, Any]) -> str:
    """What Cross-model Retrieval gains, in a sentence."""
    shares = needle_shares(content["records"], ["length"])
    accuracy = shares.set_index(["cache", "length"])["accuracy"]
    said = [
        f"{at}: {', '.join(_times(accuracy, at, other) for other in ('streaming', 'full'))}"
        for at in shares["length"].unique()
    ]
    note = "Accuracy of Cross-model Retrieval over StreamingLLM's, and over the full cache's, at"
    return f"{note} {'; '.join(said)}."


def _times(accuracy: pd.Series, length: str, other: str) -> str:
    below = accuracy[other, length]
    return f"× {accuracy['cmr', length] / below:.1f}" if below else "× ∞ (none right)"


# --- analyses: figure 3, tables 7 and 8, equation 1 -----------------------------------------------------------------


def analysis_tables(content: dict[str, Any]) -> list[str]:
    tables = {
        "divergence": divergence_table,
        "entropy": entropy_table,
        "refresh": refresh_table,
        "sweep": sweep_table,
        "equation1": equation_table,
    }
    parts = parts_of(content)
    return [text for part, table in tables.items() if part in parts for text in table(parts[part])]


def divergence_table(rows: pd.DataFrame) -> list[str]:
    kinds = [kind for kind in CACHE_NAMES if f"{kind}.kl" in rows]
    figures = [f"{kind}.{name}" for kind in kinds for name in ("kl", "same_argmax")]
    lines = {
        length: {CACHE_NAMES[kind]: f"{row[f'{kind}.kl']:.2f} ({row[f'{kind}.same_argmax']:.0%})" for kind in kinds}
        for length, row in rows.groupby("length", sort=False)[figures].mean().iterrows()
    }
    return [
        "KL divergence from the target in nats, and share of equal argmax, by position (figure 3):",
        lines_of(lines),
    ]


def entropy_table(rows: pd.DataFrame) -> list[str]:
    shares = entropy_shares(rows).pivot(index="method", columns="group", values="accepted")
    lines = {
        method: {
            "all": cell(row.mean()),
            "easy: nine tenths": cell(row.iloc[:-1].mean()),
            "hard: top tenth": cell(row.iloc[-1]),
        }
        for method, row in shares.iterrows()
    }
    return ["Share of output tokens that were accepted drafts, by the target's entropy:", lines_of(lines, "method")]


def refresh_table(rows: pd.DataFrame) -> list[str]:
    rows = rows.assign(target_forward_with_retrieval=rows["target_forward"] + rows["retrieval"])
    theirs = paper()["table7_latency_ms_16K"]
    lines = {
        label: {"paper, 16K": cell(theirs[name])}
        | {f"ours, {row['length']}": cell(row[name]) for _, row in rows.iterrows()}
        for name, label in TABLE_7.items()
    }
    return ["Beside table 7, milliseconds:", lines_of(lines, "step")]


def sweep_table(rows: pd.DataFrame) -> list[str]:
    """Table 8; ours also as accepted drafts, which no other work on the machine disturbs."""
    printed = paper()["table8_tokens_per_s_govreport_8K"]
    texts = [f"Beside table 8 (the paper's: Vicuna-68M, GovReport 8K; ours: {rows['length'].iloc[0]}), by parameter:"]
    for parameter, group in rows.groupby("parameter", sort=False):
        theirs = printed[TABLE_8.get(parameter, parameter)]["vicuna_68m"]
        means = group.groupby("value")[["accepted_per_round", "decode_tokens_per_s"]].mean()
        lines = {
            "paper: tokens/s": {str(v): cell(theirs.get(str(v))) for v in means.index},
            "ours: decode tokens/s": {str(v): cell(row["decode_tokens_per_s"], 1) for v, row in means.iterrows()},
            "ours: accepted per round": {str(v): cell(row["accepted_per_round"]) for v, row in means.iterrows()},
        }
        texts.append(lines_of(lines, parameter))
    return texts


def equation_table(rows: pd.DataFrame) -> list[str]:
    means = rows.groupby(["method", "length"], sort=False)[["predicted", "measured"]].mean()
    lines: dict[str, dict[str, str]] = {}
    for (method, length), row in means.iterrows():
        lines.setdefault(length, {})[method] = f"{row['predicted']:.2f} / {row['measured']:.2f}"
    return ["Equation 1, decoding speed-up over our autoregressive loop, predicted / measured:", lines_of(lines)]
