"""What the report says of each chapter: sentences whose numbers are computed from the journals.

What a sentence claims beyond its numbers, `tests/scripts/test_story.py` checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from scripts.report.arms import ARMS, FIXED, FULL, FULL_PRICED, PAPERS, PARTS, PRICED, STANDARD, WINDOW
from scripts.report.beside import (
    MAGICDEC,
    NAIVE,
    accepted,
    beside_table_3,
    beside_table_4,
    beside_table_6,
    beside_table_8,
    decoding_over_alone,
)
from scripts.report.markdown import cell, spread
from scripts.report.paper import paper
from specextend.evaluation.panel import Panel
from specextend.evaluation.panel_figures import figures_of, paired_difference, pooled

Row = dict[str, Any]


def speed_of(row: Row) -> str:
    speed = row["speedup_decode"]
    return spread(speed["mean"], speed["low"], speed["high"])


def row_of(rows: Sequence[Row], arm: str, length: str, temperature: float) -> Row:
    return next(row for row in rows if (row["arm"], row["length"], row["temperature"]) == (arm, length, temperature))


def kept(rows: Sequence[Row], arm: str, length: str, short: str, temperature: float) -> float:
    """Share of what the full cache accepts at the shortest length that an arm accepts at another."""
    longer, first = row_of(rows, arm, length, temperature), row_of(rows, FULL, short, temperature)
    return longer["accepted"]["mean"] / first["accepted"]["mean"]


def published(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    at = [panel for panel in panels if panel.bucket == "8K" and panel.temperature == 0.7]
    tie = paired_difference(at, PAPERS, WINDOW, "accepted")
    full, ours, priced = (row_of(rows, arm, "8K", 0.7) for arm in (FULL, PAPERS, PRICED))
    standard = (
        f" Standard is slower than AR there: {speed_of(row_of(rows, STANDARD, '8K', 0.7))}."
        if any(row["arm"] == STANDARD for row in rows)
        else ""
    )
    return (
        f"The collapse is real on a model that is not ours: at 8K the full cache accepts "
        f"{kept(rows, FULL, '8K', '512', 0.7):.0%} of what it accepts at 512 tokens, Cross-model Retrieval "
        f"{kept(rows, PAPERS, '8K', '512', 0.7):.0%}, {ours['accepted']['mean'] / full['accepted']['mean']:.2f} times "
        f"as much. A window of the same size does as well: retrieval accepts {tie.mean:+.2f} [{tie.low:+.2f}, "
        f"{tie.high:+.2f}] more per round, prompt by prompt. Priced trees decode 8K at "
        f"{priced['speedup_decode']['mean']:.2f} times AR's speed, the paper's at "
        f"{ours['speedup_decode']['mean']:.2f}; at temperature 0, where much of the text repeats itself, at "
        f"{speed_of(row_of(rows, PRICED, '8K', 0.0))}.{standard}"
    )


def bundled(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    ratios = [
        over_fixed(rows, length, temperature, kind)
        for length in dict.fromkeys(row["length"] for row in rows)
        for temperature in (0.8, 0.0)
        for kind in ("mean", "total")
    ]
    least = min(row["speedup_decode"]["smallest"] for row in rows if row["arm"] == PRICED)
    speeds = ", ".join(
        f"{row_of(rows, PRICED, length, 0.0)['decode_tokens_per_s']:,.0f}" for length in ("1K", "4K", "16K")
    )
    return (
        "At 2K standard decoding is level with AR and from 4K on slower, since dense attention writes all scores down; "
        "fast attention mends that, and a small draft cache nearly doubles what is accepted at 2K and more than "
        "doubles it from 4K on. Priced trees gain most where the draft is good: at temperature 0 they decode "
        f"{speeds} tokens/s at 1K, 4K and 16K.\n"
        "Which fixed tree is best depends on text and temperature, and nobody knows it before. Priced trees find "
        f"their own bounds: {min(ratios):.2f} to {max(ratios):.2f} of the best of three fixed trees in each of these "
        "cells (means of prompts' ratios, and totals), above the best single one on a stream that alternates both "
        f"temperatures ([table](tables/policy_h200.md)); the slowest prompt decodes at {least:.2f} of AR. Standard's "
        "dense attention reads a prompt as fast as transformers' eager one ([seconds](tables/gpu.md)), and its rounds "
        "are captured in CUDA graphs as SpecExtend's are."
    )


def over_fixed(rows: Sequence[Row], length: str, temperature: float, kind: str) -> float:
    """Speed of priced trees over the best fixed tree's: "mean" of the prompts' own, or of the "total"."""
    fixed = max(row_of(rows, arm, length, temperature)["speedup_decode"][kind] for arm in FIXED)
    return row_of(rows, PRICED, length, temperature)["speedup_decode"][kind] / fixed


def alternating(panels: Sequence[Panel], arm: str, length: str) -> float:
    """Decode tokens/s over the prompts that were answered at both temperatures, one after the other."""
    by_prompt: dict[tuple[str, int], list[Panel]] = {}
    for panel in panels:
        if panel.bucket == length:
            by_prompt.setdefault((panel.data, panel.sample), []).append(panel)
    timings = [panel.arms[arm].timing for both in by_prompt.values() if len(both) == 2 for panel in both]
    return sum(one.new_tokens for one in timings) / sum(one.decode_s for one in timings)


def tables(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    sweep = [panel for panel in panels if f"{PAPERS},top_k=2" in panel.arms]
    magicdec = decoding_over_alone(
        [panel for panel in panels if panel.bucket == "16K" and MAGICDEC in panel.arms], MAGICDEC
    )
    small, trained, wide = (accepted(sweep, f"{PAPERS},top_k={chunks}") for chunks in (2, 32, 64))
    return (
        "All on GovReport at temperature 0, end to end, means of the prompts' own ratios. Table 4, one part each over "
        f"standard ({prompts_of(panels, *PARTS)} per length):\n\n{beside_table_4(panels)}\n\n"
        "Each part alone mends one thing, reading the prompt, verification or the draft, and the others then cost as "
        "much as before; here standard is captured in CUDA graphs, so that dense attention is nearly all it costs. "
        "From 4K on all parts together gain more than the parts' gains multiplied.\n"
        f"Table 3, other methods over transformers' eager decoding ({prompts_of(panels, NAIVE)} per length):\n\n"
        f"{beside_table_3(panels)}\n\n"
        "Most is won before anything is speculated: our loop is captured in CUDA graphs, Hugging Face's is not. "
        "MagicDec and TriForce draft with the large target itself, whose weights cost as much for a draft as for a "
        f"token, until the context costs more: at 16K MagicDec decodes at {magicdec.mean:.2f} of AR. TriForce's draft "
        "cannot be captured.\n"
        f"Table 8, the draft's working cache at 8K ({len(sweep)} prompts; decoding, the paper's end to end):\n\n"
        f"{beside_table_8(sweep)}\n\n"
        f"Only the size matters, as in the paper: 64 tokens accept {small:.2f} drafts a round, 1,024 {trained:.2f}, "
        f"2,048 {wide:.2f}, more than this draft was trained for. What a refresh costs (table 7): "
        "[on a GPU](tables/gpu.md), [on a CPU](tables/analyses.md)."
    )


def prompts_of(panels: Sequence[Panel], *arms: str) -> str:
    """How many prompts of a length were answered by such arms."""
    counts = Counter(panel.bucket for panel in panels if any(arm in panel.arms for arm in arms))
    few, many = min(counts.values()), max(counts.values())
    return f"{few} prompts" if few == many else f"{few} to {many} prompts"


def long_answers(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    says = paper()["figure6_aime24_r1_distill_llama_8b_eagle3"]
    plain, ours = (row_of(rows, arm, "all", 0.5) for arm in (FULL, PAPERS))
    times = ours["decode_tokens_per_s"] / plain["decode_tokens_per_s"]
    theirs = says["eagle3_specextend"]["tokens_per_s"] / says["eagle3"]["tokens_per_s"]
    return (
        "As figure 6: with a full cache the head loses the text that it helps to write, with a small one it does not. "
        f"The paper reports {says['eagle3']['tau']} → {says['eagle3_specextend']['tau']} accepted and {theirs:.2f} "
        f"times the speed, over a full cache with dense attention; here it is {plain['accepted']['mean']:.2f} → "
        f"{ours['accepted']['mean']:.2f} and {times:.2f} times, over fast attention. Most of these answers end in a "
        f"loop, which small drafts like. Accepted by output token, up to {STRETCHES[1]:,}, {STRETCHES[2]:,} and "
        f"{STRETCHES[3]:,}: {by_output(panels)}."
    )


STRETCHES = (0, 1000, 4000, 8000)


def by_output(panels: Sequence[Panel]) -> str:
    """Draft tokens accepted per round by position in the output, all prompts together."""
    said = []
    for arm, name in ARMS.items():
        answers = [panel.arms[arm].accepted for panel in panels if arm in panel.arms]
        means = []
        for low, high in pairwise(STRETCHES):
            inside = [
                kept
                for rounds in answers
                for kept, at in zip(rounds, accumulate((kept + 1 for kept in rounds), initial=0), strict=False)
                if low <= at < high
            ]
            means.append(cell(sum(inside) / len(inside)) if inside else "")
        if answers:
            said.append(f"{name} {', '.join(means)}")
    return "; ".join(said)


def bundled_head(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    sampled = [row for row in rows if row["temperature"] == 0.8]
    full, ours, priced = (row_of(sampled, arm, "16K", 0.8) for arm in (FULL, PAPERS, PRICED))
    few, many = (choose(row["prompts"] for row in sampled) for choose in (min, max))
    return (
        "An EAGLE-1 head that reads the target's features loses less with a full cache than a small language model; at "
        f"16K and temperature 0.8 a small cache gives it {ours['accepted']['mean'] / full['accepted']['mean']:.1f} "
        f"times as much, and decodes at {speed_of(ours)} of AR, with priced trees at {speed_of(priced)} ({few} to "
        f"{many} prompts per length)."
    )


def long_inputs(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    standard = row_of(rows, STANDARD, "32K", 0.8)
    timings = [
        [panel.arms[arm].timing.prefill_s for panel in panels if arm in panel.arms and panel.bucket == "32K"]
        for arm in (STANDARD, PAPERS)
    ]
    more = {}
    for length in ("32K", "128K"):
        at = [panel for panel in panels if (panel.bucket, panel.temperature) == (length, 0.8)]
        more[length] = accepted(at, PAPERS) / accepted(at, FULL)
    dense, flash = (sum(sum(one.values()) for one in there) / len(there) for there in timings)
    return (
        "The bundled target, learned on for four minutes at eight times its positions (`-m bundled_128k`), with the "
        "head of the target that it was. Beside the paper's table 6 (Llama-3.1-8B, EAGLE, PG-19):\n\n"
        f"{beside_table_6(panels)}\n\n"
        f"Sampled, a small cache accepts {more['32K']:.1f} and {more['128K']:.1f} times as much as a full one, with "
        "which 128K decode slower than AR. Standard was measured at 32K alone: dense attention reads that in "
        f"{dense:.1f} s (FlashAttention: {flash:.1f}), and decodes at {speed_of(standard)} of AR (0.8). At temperature "
        "0 every answer ends in a loop."
    )


def hard(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    cells = [row for _, there in kinds_of_hard(panels) for row in there]
    priced = [row["speedup_decode"] for row in cells if row["arm"] in (PRICED, FULL_PRICED)]
    fixed = min(row["speedup_decode"]["mean"] for row in cells if row["arm"] == PAPERS)
    return (
        f"A draft with random weights: the paper's tree decodes at down to {fixed:.2f} of AR, a priced tree stops "
        f"drafting (means of {min(one['mean'] for one in priced):.2f} of AR and more, single prompts of "
        f"{min(one['smallest'] for one in priced):.2f} and more), and the looked-up branch still gains where text "
        "repeats its input. An answer of 16 tokens ends before much is learned of its prompt, and gains none the less "
        "([table](tables/policy_h200.md))."
    )


def kinds_of_hard(panels: Sequence[Panel]) -> Iterator[tuple[str, list[Row]]]:
    """Of a draft that knows nothing and of short answers: their name and their figures."""
    for name, short in (("random draft", False), ("answers of 16 tokens", True)):
        yield name, pooled(figures_of([panel for panel in panels if (FULL_PRICED not in panel.arms) == short]))


def cpu(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    least = min(row["speedup_decode"]["smallest"] for row in rows if row["arm"] == PRICED)
    lengths = ("512", "1K", "4K", "8K", "16K")
    greedy = [row_of(rows, PRICED, length, 0.0)["speedup_decode"]["mean"] for length in lengths]
    return (
        "Where every node of a tree costs time, the tree has to earn it: sampled, and up to 8K, fixed trees are slower "
        "than AR, priced ones level with it or a little faster, and single prompts can lose: the slowest decodes at "
        f"{least:.2f} of AR. At temperature 0 they decode at {min(greedy):.2f} to {max(greedy):.2f} of it."
    )


def published_cpu(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    least = min(row["speedup_decode"]["smallest"] for row in rows if row["arm"] == PRICED)
    whole = [row_of(rows, "standard:tree=price", "2K", temperature)["speedup"]["mean"] for temperature in (0.7, 0.0)]
    greedy = ", ".join(f"{speed_of(row_of(rows, PRICED, at, 0.0))} at {at}" for at in ("512", "2K", "4K"))
    return (
        f"At temperature 0 priced trees decode at {greedy}; 4K were measured on faster cores. Every answer is AR's, "
        f"token for token. The slowest prompt decodes at {least:.2f} of AR. Reading 2K with "
        f"dense attention costs standard more than its trees earn: {whole[0]:.2f} and {whole[1]:.2f} of AR end to end."
    )
