"""The paper's tables with ours beside them, from journals of several arms: tables 2 to 6 and 8."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scripts.report.arms import FULL, PAPERS, PARTS, PRICED, STANDARD
from scripts.report.markdown import cell, lines_of, spread
from scripts.report.paper import paper
from specextend.data.prompts import nominal_tokens
from specextend.evaluation.panel import Answer, Panel
from specextend.evaluation.panel_figures import Interval, interval

Papers = Mapping[tuple[str, bool], Mapping[str, Any]]  # a row of the paper by length and whether with SpecExtend
TABLE_4 = "table4_ablation_govreport_vicuna_7b_68m"
TABLE_5 = "table5_llama31_8b_govreport (rows whose digits are legible)"
TABLE_6 = "table6_llama31_8b_eagle_pg19_long"
TABLE_8 = "table8_tokens_per_s_govreport_8K"
ALONE, NAIVE, MAGICDEC = "AR", "autoregressive_hf", "magicdec"
RIVALS = {  # an arm, its name in the paper's table 3 and here
    ALONE: ("FlashDecoding", "AR, ours (the paper's: FlashDecoding)"),
    "triforce": ("TriForce", "TriForce"),
    MAGICDEC: ("MagicDec", "MagicDec"),
    STANDARD: ("Standard", "standard"),
    PAPERS: ("Standard+SpecExtend", "SpecExtend"),
}
CACHE = 1024  # tokens of the working cache where chunks of other sizes fill it


def table_2(draft: str) -> Papers:
    """The paper's figures on GovReport with Vicuna-7B."""
    rows = _govreport("table2_main")
    return _by_length(row for row in rows if (row["target"], row["draft"]) == ("vicuna_7b", draft))


def table_5(draft: str) -> Papers:
    """The paper's figures on GovReport with Llama-3.1-8B."""
    return _by_length(row for row in paper()[TABLE_5] if row["draft"] == draft)


def _govreport(table: str) -> list[dict[str, Any]]:
    return [row for row in paper()[table] if row["dataset"] == "GovReport"]


def _by_length(rows: Iterable[Mapping[str, Any]]) -> Papers:
    return {(row["length"], row["specextend"]): row for row in rows}


def _greedy(panels: Sequence[Panel]) -> list[Panel]:
    """Those on GovReport at temperature 0, as most of the paper's tables are."""
    return [panel for panel in panels if panel.data == "govreport" and panel.temperature == 0]


def beside_standard(panels: Sequence[Panel], papers: Papers) -> str:
    """Standard and SpecExtend with the paper's tree on GovReport at temperature 0, at the lengths of both."""
    here = [panel for panel in _greedy(panels) if STANDARD in panel.arms]
    lengths = {panel.bucket for panel in here} & {length for length, _ in papers}
    lines = {}
    for length in sorted(lengths, key=nominal_tokens):
        at = [panel for panel in here if panel.bucket == length]
        before, after = papers[length, False], papers[length, True]
        lines[length] = {
            "prompts": str(len(at)),
            "accepted: paper": f"{before['tau']:.2f} → {after['tau']:.2f}",
            "accepted: ours": " → ".join(cell(accepted(at, arm)) for arm in (STANDARD, PAPERS)),
            "end to end over standard: paper": f"{after['speedup'] / before['speedup']:.2f}",
            "ours": shown(over_standard(at, PAPERS)),
            "ours, decoding": shown(over_standard(at, PAPERS, "decode_tokens_per_s")),
            "ours, priced trees, decoding": shown(over_standard(at, PRICED, "decode_tokens_per_s")),
        }
    return lines_of(lines)


def accepted(panels: Sequence[Panel], arm: str) -> float:
    """Draft tokens per round, all rounds of all prompts together, as the paper counts."""
    rounds = [kept for panel in panels for kept in panel.arms[arm].accepted]
    return sum(rounds) / len(rounds)


def decoding_over_alone(panels: Sequence[Panel], arm: str) -> Interval:
    """Decoding speed of an arm over AR's, the prompts' own ratios."""
    return interval(np.array([_over_alone(panel, arm) for panel in panels]))


def over_standard(panels: Sequence[Panel], arm: str, speed: str = "tokens_per_s") -> Interval:
    """Speed of an arm over standard's on the same prompts, end to end or of `decode_tokens_per_s`."""
    pairs = [(panel.arms[arm], panel.arms[STANDARD]) for panel in panels if arm in panel.arms]
    return interval(np.array([_speed(ours, speed) / _speed(standard, speed) for ours, standard in pairs]))


def _speed(answer: Answer, speed: str) -> float:
    return getattr(answer.timing, speed)


def shown(found: Interval) -> str:
    return spread(found.mean, found.low, found.high) if found.prompts else "–"


def beside_table_3(panels: Sequence[Panel]) -> str:
    """End to end over Hugging Face's eager decoding, the paper's; ours, where that was measured."""
    speeds = {(row["method"], row["length"]): row["speedup"] for row in _govreport("table3_methods_vicuna_7b")}
    whole = [(length, found) for length, found in over_alone(panels) if NAIVE in found]
    return lines_of(
        {
            name: {
                length: f"{speeds[method, length]:.2f}; {shown(_mean_ratio(whole, length, arm, NAIVE))}"
                for length in sorted({length for length, _ in whole}, key=nominal_tokens)
            }
            for arm, (method, name) in RIVALS.items()
        },
        "over eager decoding: paper; ours",
    )


def beside_table_4(panels: Sequence[Panel]) -> str:
    """End to end over standard, the paper's; ours, on the prompts that each part alone was measured on."""
    whole = [(length, found) for length, found in over_alone(panels) if PARTS.keys() | {STANDARD} <= found.keys()]
    speeds = {(row["setting"], row["length"]): row["tokens_per_s"] for row in paper()[TABLE_4]}
    together = table_2("vicuna_68m")
    lines: dict[str, dict[str, str]] = {}
    for arm, setting in (PARTS | {PAPERS: "SpecExtend"}).items():
        line = lines[setting.replace("Standard+", "+ ").replace("SpecExtend", "all parts (table 2)")] = {}
        for length in sorted({length for length, _ in whole}, key=nominal_tokens):
            if arm == PAPERS:
                theirs = together[length, True]["tokens_per_s"] / together[length, False]["tokens_per_s"]
            else:
                theirs = speeds[setting, length] / speeds["Standard", length]
            line[length] = f"{theirs:.2f}; {shown(_mean_ratio(whole, length, arm, STANDARD))}"
    return lines_of(lines, "over standard: paper; ours")


def over_alone(panels: Sequence[Panel]) -> list[tuple[str, dict[str, float]]]:
    """Length and, by arm, speed end to end over AR in the same panel, of each prompt of GovReport at temperature 0.

    Arms that were measured in different processes stand beside AR each, and can so be compared.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for panel in _greedy(panels):
        alone = panel.autoregressive.timing.tokens_per_s
        speeds = {arm: answer.timing.tokens_per_s / alone for arm, answer in panel.arms.items()}
        found.setdefault((panel.bucket, panel.prompt_sha256), {ALONE: 1.0}).update(speeds)
    return [(length, speeds) for (length, _), speeds in found.items()]


def _mean_ratio(whole: Sequence[tuple[str, Mapping[str, float]]], length: str, arm: str, over: str) -> Interval:
    return interval(np.array([found[arm] / found[over] for at, found in whole if at == length]))


def beside_table_6(panels: Sequence[Panel]) -> str:
    """Inputs beyond 16K: accepted drafts, and decoding over AR, by length and temperature."""
    papers = _by_length(paper()[TABLE_6])
    lines: dict[str, dict[str, str]] = {}
    cells = {(panel.bucket, panel.temperature) for panel in panels}
    for length, temperature in sorted(cells, key=lambda one: (nominal_tokens(one[0]), -one[1])):
        at = [panel for panel in panels if (panel.bucket, panel.temperature) == (length, temperature)]
        theirs = [f"{papers[length, ours]['tau']:.2f}" if (length, ours) in papers else "–" for ours in (False, True)]
        line = {"prompts": str(len(at)), "accepted: paper": " → ".join(theirs)}
        line["accepted: full cache → SpecExtend, priced trees"] = (
            f"{cell(accepted(at, FULL))} → {cell(accepted(at, PAPERS))}, {cell(accepted(at, PRICED))}"
        )
        for arm, name in ((FULL, "full cache"), (PAPERS, "SpecExtend"), (PRICED, "priced trees")):
            line[f"decoding over AR: {name}"] = shown(decoding_over_alone(at, arm))
        lines[f"{length}, {temperature:g}"] = line
    return lines_of(lines, "length, temperature")


def beside_table_8(panels: Sequence[Panel]) -> str:
    """Sizes of the draft's working cache, of its chunks, and how often it is filled anew, with the small draft."""
    papers = paper()[TABLE_8]
    kinds = {  # the paper's name for it: ours, its arms by value, and the value that the default arm has
        "working_cache_size": ("tokens of the working cache", lambda value: f"top_k={value // 32}", CACHE),
        "chunk_size": ("tokens of a chunk", lambda value: f"chunk_size={value},top_k={CACHE // value}", 32),
        "retrieval_every_n_steps": ("rounds between refreshes", lambda value: f"every_n_steps={value}", 4),
    }
    lines: dict[str, dict[str, str]] = {}
    for kind, (name, setting, default) in kinds.items():
        rows = {int(value): speed for value, speed in papers[kind]["vicuna_68m"].items()}
        arms = {value: f"{PAPERS},{'top_k=32' if value == default else setting(value)}" for value in rows}
        there = {value: arm for value, arm in arms.items() if arm in panels[0].arms}
        lines[name] = {
            "values": ", ".join(str(value) for value in there),
            "paper: tokens/s": ", ".join(f"{rows[value]:.1f}" for value in there),
            "ours: tokens/s": ", ".join(f"{rate(panels, arm):.0f}" for arm in there.values()),
            "ours: accepted": ", ".join(cell(accepted(panels, arm)) for arm in there.values()),
        }
    return lines_of(lines, "parameter")


def rate(panels: Sequence[Panel], arm: str) -> float:
    """Decode tokens/s over all prompts."""
    timings = [panel.arms[arm].timing for panel in panels]
    return sum(one.new_tokens - 1 for one in timings) / sum(one.decode_s for one in timings)


def measured_again(first: Sequence[Panel], second: Sequence[Panel], arm: str) -> tuple[int, float, float]:
    """How many answers two journals share, and the share by which an arm's speed-up differs, its median and most."""
    before = {_question(panel): panel for panel in first}
    changes = []
    for panel in second:
        if _question(panel) in before:
            ratios = [_over_alone(one, arm) for one in (before[_question(panel)], panel)]
            changes.append(abs(ratios[1] / ratios[0] - 1))
    return len(changes), statistics.median(changes), max(changes)


def _question(panel: Panel) -> tuple[str, float]:
    return panel.prompt_sha256, panel.temperature


def _over_alone(panel: Panel, arm: str) -> float:
    return panel.arms[arm].timing.decode_tokens_per_s / panel.autoregressive.timing.decode_tokens_per_s
