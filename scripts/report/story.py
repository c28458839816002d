"""The report's first part: what was asked, and what the journals of several arms answer.

Every number is computed from the journals; what a sentence claims beyond that, `tests/scripts/test_story.py` checks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from scripts.report.arms import ARMS, FIXED, FULL, FULL_PRICED, PAPERS, PARTS, PRICED, STANDARD, WINDOW
from scripts.report.beside import (
    NAIVE,
    Papers,
    accepted,
    beside_standard,
    beside_table_3,
    beside_table_4,
    beside_table_6,
    beside_table_8,
    measured_again,
    table_2,
    table_5,
)
from scripts.report.evidence import journals_in
from scripts.report.evidence_plots import by_length
from scripts.report.markdown import cell, lines_of, spread
from scripts.report.paper import paper
from scripts.report.quotations import FORCED, frame_of_scores
from scripts.report.records import models_and_place, read_documents
from scripts.report.vllm import autoregressive_rates
from specextend.data.prompts import nominal_tokens
from specextend.evaluation.panel import Panel
from specextend.evaluation.panel_figures import figures_of, interval, paired_difference, pooled, read_panels

Row = dict[str, Any]
TRAINED = Path(__file__).parents[2] / "specextend" / "models" / "heads" / "smollm2"
RENAMED = {"standard": STANDARD}  # in journals of the time when a GPU's default was the paper's tree
VLLM = "AR, vLLM"
QUESTION = (
    "Speculative decoding loses its speed on long inputs: attention gets slow, and a draft trained on short text stops "
    "agreeing with the target. Does SpecExtend mend both without training, what does it cost, and against whom?"
)
LEGEND = (
    "*AR*: our own autoregressive loop, in tokens per second. *Standard*: dense attention, the draft keeps the "
    "whole context. *Full cache*: the same with FlashAttention and Hybrid Tree Attention. *Window*: its draft cache "
    "holds the first and the newest tokens. *SpecExtend*: with Cross-model Retrieval of the same size. All four "
    "grow the paper's trees (50 nodes, depth 10, stop at 0.7); *priced trees* are as large as they earn their time, "
    "with one branch looked up in the text. In each cell: decoding speed-up over AR on the same prompt in the same "
    "process, mean of the prompts' own ratios with its 95 % bootstrap interval; then draft tokens accepted per "
    "round."
)


NOT_REPRODUCED = (
    "**Retrieval against a window of the same size.** The paper's table 4 puts Cross-model Retrieval far above "
    "StreamingLLM. Here the two tie on summaries with three drafts, two targets and 16 to 27 prompts per length; "
    "retrieval wins where a fact stands far back and the draft can use it (needles above), and a little on "
    "quotations. What mends the collapse is that the draft's cache is small.",
    "**All of the short prompt's acceptance.** At 8K retrieval keeps four fifths of it, not all.",
    "**Acceptance of the paper's order on long summaries** needs its models, which could not be loaded where this was "
    "measured; `bash scripts/reproduce_all.sh paper` is how to do it.",
)
THREATS = (
    "The targets are small (135M and 14M parameters); widening keeps their tokens and adds the cost of 7B and 8B. How "
    "often a large model's draft is right is another matter. EAGLE heads were trained here, on at most 1,024 tokens of "
    "context, and agree with their target on AGREE_1 "
    "(EAGLE-1) and AGREE_3 (EAGLE-3) of its own text.",
    "16 to 27 prompts per length from three data sets (7 and 9 with the random draft, 7 for the working cache, 3 or 4 "
    "for inputs beyond 16K, long answers, each part alone and other methods), one run each, with EAGLE-3 on the "
    "published model two; answers of at most 200 tokens (8,000 the long ones). Intervals are over prompts.",
    "Greedy text of small models repeats itself, which flatters drafts and the looked-up branch most: read 0.7 and 0.8 "
    "first. Pages show every cell again without looping answers.",
    "In float16 some answers part from AR at a near-tie; the pages say at which distance. In float32 tests demand "
    "equality. CPU figures come from two cores of a shared machine, whose speed moves by a fifth between two runs.",
)


@dataclass(frozen=True)
class Beside:
    """A table of the paper that a chapter's pair is laid beside, on GovReport at temperature 0.

    Args:
        table: what it is.
        papers: gives its rows.
        journals: where standard was measured; none: the chapter's own.
    """

    table: str
    papers: Callable[[], Papers]
    journals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chapter:
    """Journals of one pair of models on one machine, and what is said of them.

    Args:
        journals: under the results; lengths of all of them stand in one table.
        figures: temperatures by names under `figures/`, without their ends.
        judge: sentences out of the rows of all data sets together.
        temperatures: those that have a table of all arms here; None: all. Without any, journals may differ in arms.
        beside: a table of the paper.
        again: a journal of the same prompts at another time.
        beside_vllm: vLLM has decoded this pair on such a machine, too; the README shows the lengths of both.
    """

    title: str
    journals: tuple[str, ...]
    figures: Mapping[str, float]
    judge: Callable[[Sequence[Panel], Sequence[Row]], str]
    temperatures: tuple[float, ...] | None = None
    beside: Beside | None = None
    again: str = ""
    beside_vllm: bool = False

    @property
    def all_journals(self) -> tuple[str, ...]:
        others = (self.beside.journals if self.beside else ()) + ((self.again,) if self.again else ())
        return self.journals + others


def sections(results: Path) -> Iterator[str]:
    """The report's first sections; nothing where no journal of `CHAPTERS` is there."""
    chapters = told(results)
    if not chapters:
        return
    yield f"## What was asked\n\n{QUESTION}\n{LEGEND}"
    for chapter in chapters:
        manifest, panels = read_chapter(results, chapter)
        rows = rows_of(chapter, panels)
        pages = (Path(name).stem for name in chapter.all_journals)
        links = ", ".join(f"[{page}](tables/{page}.md)" for page in pages)
        about = f"{_about(manifest, panels)} By data set, end to end, smallest gains, where tokens part: {links}."
        temperatures = chapter.temperatures
        if temperatures is None:
            temperatures = tuple(dict.fromkeys(row["temperature"] for row in rows))
        opening = f"## {chapter.title}\n\n{about}"
        if not temperatures:
            yield opening
        for temperature in temperatures:
            first = f"{opening}\n" if temperature == temperatures[0] else ""
            yield f"{first}Temperature {temperature:g}{_loops(rows, temperature)}:"
            yield table(rows, temperature)
        drawn = [
            f"![{chapter.title}: acceptance and decoding speed-up by length](figures/{figure}.svg)"
            for figure in chapter.figures
        ]
        again = [measured_before(results, chapter, panels)] if chapter.again else []
        said, *tables = _beside(results, chapter.beside, panels) if chapter.beside else [""]
        yield "\n".join(filter(None, [*drawn, chapter.judge(panels, rows), *again, said]))
        yield from tables
    yield from _quotations(results)


def headlines(results: Path) -> Iterator[str]:
    """The tables of the README: of each chapter that is drawn, the highest temperature."""
    for chapter in told(results):
        if chapter.figures:
            manifest, panels = read_chapter(results, chapter)
            rows = rows_of(chapter, panels)
            highest = rows[0]["temperature"]
            yield f"{chapter.title}, temperature {highest:g}: {_about(manifest, panels)}"
            lines = _cells(rows, highest, _speed)
            yield lines_of(_beside_vllm(results, lines) if chapter.beside_vllm else lines)


def _beside_vllm(results: Path, lines: Mapping[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The lengths at which vLLM was measured, with its autoregressive speed; all of them where it was not."""
    path = results / "h200" / "vllm.json"
    if not path.exists():
        return dict(lines)
    rates = autoregressive_rates(json.loads(path.read_text(encoding="utf-8")))
    return {
        length: {"prompts": line["prompts"], VLLM: f"{rates[length]:.0f}"} | line
        for length, line in lines.items()
        if length in rates
    }


def told(results: Path) -> list[Chapter]:
    """The chapters whose journals are all there."""
    return [chapter for chapter in CHAPTERS if all((results / name).exists() for name in chapter.all_journals)]


def pages_apart(results: Path) -> list[str]:
    """Pages of journals of several arms that no chapter tells of."""
    chapters = told(results)
    journals = {results / name for chapter in chapters for name in chapter.all_journals}
    apart = [path for path in journals_in([results]) if path not in journals] if chapters else []
    return [f"tables/{path.stem}.md" for path in apart]


def read_chapter(results: Path, chapter: Chapter) -> tuple[dict[str, Any], list[Panel]]:
    return _read(results, chapter.journals)


def _read(results: Path, journals: Sequence[str]) -> tuple[dict[str, Any], list[Panel]]:
    read = [read_panels(results / name) for name in journals]
    return read[0][0], [replace(one, arms=_renamed(one.arms)) for _, panels in read for one in panels]


def rows_of(chapter: Chapter, panels: Sequence[Panel]) -> list[Row]:
    """Figures of all data sets together; none where nothing is tabled, since journals may have other arms each."""
    return [] if chapter.temperatures == () else pooled(figures_of(panels))


def _renamed(arms: Mapping[str, Any]) -> dict[str, Any]:
    return {RENAMED.get(name, name): arm for name, arm in arms.items()}


def table(rows: Sequence[Row], temperature: float) -> str:
    """Lengths by arms, those of `ARMS`, at one temperature: speed-up and acceptance."""
    return lines_of(_cells(rows, temperature, _both))


def _cells(rows: Sequence[Row], temperature: float, show: Callable[[Row], str]) -> dict[str, dict[str, str]]:
    """By length and column."""
    lines: dict[str, dict[str, str]] = {}
    there = [row for row in rows if row["temperature"] == temperature]
    names = {arm: name for arm, name in ARMS.items() if any(row["arm"] == arm for row in there)}
    for length in sorted({row["length"] for row in there}, key=nominal_tokens):
        at = {row["arm"]: row for row in there if row["length"] == length}
        first = next(iter(at.values()))
        lines[length] = {"prompts": str(first["prompts"]), "AR": f"{first['ar_decode_tokens_per_s']:.0f}"}
        lines[length] |= {name: show(at[arm]) if arm in at else "–" for arm, name in names.items()}
    return lines


def _both(row: Row) -> str:
    return f"{_speed(row)}; {row['accepted']['mean']:.2f}"


def _speed(row: Row) -> str:
    speed = row["speedup_decode"]
    return spread(speed["mean"], speed["low"], speed["high"])


def _about(manifest: dict[str, Any], panels: Sequence[Panel]) -> str:
    setting = manifest["setting"]
    data = ", ".join(dict.fromkeys(panel.data for panel in panels))
    return f"{models_and_place(setting, manifest['environment'])}; {data}; up to {setting['max_gen_len']} new tokens."


def _loops(rows: Sequence[Row], temperature: float) -> str:
    """How many answers end in a loop, of the arm on which most do."""
    there = [row for row in rows if row["temperature"] == temperature]
    shares = [max(row["loops"] for row in there if row["length"] == at) for at in {row["length"] for row in there}]
    least, most = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return f" ({least if least == most else f'{least} to {most}'} of the answers of a length end in a loop)"


# --- what is said of each -------------------------------------------------------------------------------------------


def _row(rows: Sequence[Row], arm: str, length: str, temperature: float) -> Row:
    return next(row for row in rows if (row["arm"], row["length"], row["temperature"]) == (arm, length, temperature))


def kept(rows: Sequence[Row], arm: str, length: str, short: str, temperature: float) -> float:
    """Share of what the full cache accepts at the shortest length that an arm accepts at another."""
    longer, first = _row(rows, arm, length, temperature), _row(rows, FULL, short, temperature)
    return longer["accepted"]["mean"] / first["accepted"]["mean"]


def _judge_published(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    rows = rows or pooled(figures_of(panels))
    at = [panel for panel in panels if panel.bucket == "8K" and panel.temperature == 0.7]
    tie = paired_difference(at, PAPERS, WINDOW, "accepted")
    full, ours, priced = (_row(rows, arm, "8K", 0.7) for arm in (FULL, PAPERS, PRICED))
    return (
        f"The collapse is real on a model that is not ours: at 8K the full cache accepts "
        f"{kept(rows, FULL, '8K', '512', 0.7):.0%} of what it accepts at 512 tokens, Cross-model Retrieval "
        f"{kept(rows, PAPERS, '8K', '512', 0.7):.0%}, {ours['accepted']['mean'] / full['accepted']['mean']:.2f} times "
        f"as much. A window of the same size does as well: retrieval accepts {tie.mean:+.2f} [{tie.low:+.2f}, "
        f"{tie.high:+.2f}] more per round, prompt by prompt. Priced trees decode 8K at "
        f"{priced['speedup_decode']['mean']:.2f} times AR's speed, the paper's at "
        f"{ours['speedup_decode']['mean']:.2f}; at temperature 0, where much of the text repeats itself, at "
        f"{_speed(_row(rows, PRICED, '8K', 0.0))}."
    )


def _beside(results: Path, beside: Beside, panels: Sequence[Panel]) -> tuple[str, str]:
    """What is said of the paper's table with ours, how far two measurements are apart with it; and that table."""
    again = ""
    if beside.journals:
        _, other = _read(results, beside.journals)
        prompts, median, most = measured_again(panels, other, PAPERS)
        again = (
            f" Standard was measured in a second process; there SpecExtend's decoding over AR differs by {median:.1%} "
            f"from what stands above (median of the {prompts} answers that both have, at most {most:.0%})."
        )
        panels = other
    said = f"Beside {beside.table}, standard → SpecExtend, GovReport, temperature 0, means of the prompts' own ratios."
    return said + again, beside_standard(panels, beside.papers())


def _judge_bundled(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    ratios = [
        over_fixed(rows, length, temperature, kind)
        for length in dict.fromkeys(row["length"] for row in rows)
        for temperature in (0.8, 0.0)
        for kind in ("mean", "total")
    ]
    least = min(row["speedup_decode"]["smallest"] for row in rows if row["arm"] == PRICED)
    speeds = ", ".join(
        f"{_row(rows, PRICED, length, 0.0)['decode_tokens_per_s']:,.0f}" for length in ("1K", "4K", "16K")
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


def measured_before(results: Path, chapter: Chapter, panels: Sequence[Panel]) -> str:
    """What priced trees gained when the same prompts were measured at another time, and how far prompts are apart."""
    _, before = _read(results, (chapter.again,))
    rows = [row for row in pooled(figures_of(before)) if row["arm"] == PRICED]
    highest = max(row["temperature"] for row in rows)
    there = sorted(
        (row for row in rows if row["temperature"] == highest), key=lambda row: nominal_tokens(row["length"])
    )
    said = ", ".join(f"{_speed(row)} at {row['length']}" for row in there)
    answers, median, most = measured_again(before, panels, PRICED)
    return (
        f"Measured at another time, priced trees gained {said}; of the {answers} answers that both have, the speed-up "
        f"differs by {median:.1%} (median) and at most {most:.0%}."
    )


def over_fixed(rows: Sequence[Row], length: str, temperature: float, kind: str) -> float:
    """Speed of priced trees over the best fixed tree's: "mean" of the prompts' own, or of the "total"."""
    fixed = max(_row(rows, arm, length, temperature)["speedup_decode"][kind] for arm in FIXED)
    return _row(rows, PRICED, length, temperature)["speedup_decode"][kind] / fixed


def alternating(panels: Sequence[Panel], arm: str, length: str) -> float:
    """Decode tokens/s over the prompts that were answered at both temperatures, one after the other."""
    by_prompt: dict[tuple[str, int], list[Panel]] = {}
    for panel in panels:
        if panel.bucket == length:
            by_prompt.setdefault((panel.data, panel.sample), []).append(panel)
    timings = [panel.arms[arm].timing for both in by_prompt.values() if len(both) == 2 for panel in both]
    return sum(one.new_tokens for one in timings) / sum(one.decode_s for one in timings)


def fixed_trees(results: Path) -> Iterator[str]:
    """Sections of a page of its own, priced trees beside fixed ones; nothing where no such journals are there."""
    chapters = {chapter.judge: chapter for chapter in told(results)}
    if chapter := chapters.get(_judge_bundled):
        manifest, panels = read_chapter(results, chapter)
        yield (
            f"{_about(manifest, panels)}\n\nDecoding over AR, mean of the prompts' own ratios, at temperature 0.8 and "
            "0: three trees of fixed bounds (50 nodes) and priced ones. *Alternating*: the prompts that were answered "
            "at both temperatures in turns, all tokens over all seconds, priced trees over the best of the fixed.\n\n"
            f"{beside_fixed(panels, rows_of(chapter, panels))}"
        )
    if chapter := chapters.get(_judge_hard):
        _, panels = read_chapter(results, chapter)
        yield (
            "What is hard for priced trees, the same target: a draft of random weights, and answers of 16 tokens; "
            f"decoding over AR, and drafts accepted per round.\n\n{hard_for_trees(panels)}"
        )


def beside_fixed(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    """Fixed trees and priced ones by length and temperature, and on a stream that alternates the temperatures."""
    lines: dict[str, dict[str, str]] = {}
    for length in sorted({row["length"] for row in rows}, key=nominal_tokens):
        lines[length] = {
            f"{temperature:g}: {name}": f"{_row(rows, arm, length, temperature)['speedup_decode']['mean']:.2f}"
            for temperature in (0.8, 0.0)
            for arm, name in (FIXED | {PRICED: "priced"}).items()
        }
        best = max(alternating(panels, arm, length) for arm in FIXED)
        lines[length]["alternating: priced over the best"] = f"{alternating(panels, PRICED, length) / best:.2f}"
    return lines_of(lines)


def _judge_tables(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    sweep = [panel for panel in panels if f"{PAPERS},top_k=2" in panel.arms]
    small, trained, wide = (accepted(sweep, f"{PAPERS},top_k={chunks}") for chunks in (2, 32, 64))
    return (
        "All on GovReport at temperature 0, end to end, means of the prompts' own ratios. Table 4, one part each over "
        f"standard ({_prompts(panels, *PARTS)} per length):\n\n{beside_table_4(panels)}\n\n"
        "Each part alone mends one thing, reading the prompt, verification or the draft, and the others then cost as "
        "much as before; here standard is captured in CUDA graphs, so that dense attention is nearly all it costs. "
        "From 4K on all parts together gain more than the parts' gains multiplied.\n"
        f"Table 3, other methods over transformers' eager decoding ({_prompts(panels, NAIVE)} per length):\n\n"
        f"{beside_table_3(panels)}\n\n"
        "Most is won before anything is speculated: our loop is captured in CUDA graphs, Hugging Face's is not. "
        "MagicDec and TriForce draft with the large target itself, whose weights cost as much for a draft as for a "
        "token; TriForce's draft cannot be captured.\n"
        f"Table 8, the draft's working cache at 8K ({len(sweep)} prompts; decoding, the paper's end to end):\n\n"
        f"{beside_table_8(sweep)}\n\n"
        f"Only the size matters, as in the paper: 64 tokens accept {small:.2f} drafts a round, 1,024 {trained:.2f}, "
        f"2,048 {wide:.2f}, more than this draft was trained for. What a refresh costs (table 7): "
        "[on a GPU](tables/gpu.md), [on a CPU](tables/analyses.md)."
    )


def _prompts(panels: Sequence[Panel], *arms: str) -> str:
    """How many prompts of a length were answered by such arms."""
    counts = Counter(panel.bucket for panel in panels if any(arm in panel.arms for arm in arms))
    few, many = min(counts.values()), max(counts.values())
    return f"{few} prompts" if few == many else f"{few} to {many} prompts"


def _judge_long(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    says = paper()["figure6_aime24_r1_distill_llama_8b_eagle3"]
    plain, ours = (_row(rows, arm, "all", 0.5) for arm in (FULL, PAPERS))
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


def _judge_bundled_head(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    sampled = [row for row in pooled(figures_of(panels)) if row["temperature"] == 0.8]
    full, ours, priced = (_row(sampled, arm, "16K", 0.8) for arm in (FULL, PAPERS, PRICED))
    few, many = (choose(row["prompts"] for row in sampled) for choose in (min, max))
    return (
        "An EAGLE-1 head that reads the target's features loses less with a full cache than a small language model; at "
        f"16K and temperature 0.8 a small cache gives it {ours['accepted']['mean'] / full['accepted']['mean']:.1f} "
        f"times as much, and decodes at {_speed(ours)} of AR, with priced trees at {_speed(priced)} ({few} to {many} "
        "prompts per length)."
    )


def _judge_long_inputs(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    figures = pooled(figures_of([panel for panel in panels if panel.bucket == "32K"]))
    standard = _row(figures, STANDARD, "32K", 0.8)
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
        f"{dense:.1f} s (FlashAttention: {flash:.1f}), and decodes at {_speed(standard)} of AR (0.8). At temperature 0 "
        "every answer ends in a loop."
    )


def _judge_hard(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    cells = [row for _, there in _kinds_of_hard(panels) for row in there]
    priced = [row["speedup_decode"] for row in cells if row["arm"] in (PRICED, FULL_PRICED)]
    fixed = min(row["speedup_decode"]["mean"] for row in cells if row["arm"] == PAPERS)
    return (
        f"A draft with random weights: the paper's tree decodes at down to {fixed:.2f} of AR, a priced tree stops "
        f"drafting (means of {min(one['mean'] for one in priced):.2f} of AR and more, single prompts of "
        f"{min(one['smallest'] for one in priced):.2f} and more), and the looked-up branch still gains where text "
        "repeats its input. An answer of 16 tokens ends before much is learned of its prompt, and gains none the less "
        "([table](tables/policy_h200.md))."
    )


def _kinds_of_hard(panels: Sequence[Panel]) -> Iterator[tuple[str, list[Row]]]:
    """Of a draft that knows nothing and of short answers: their name and their figures."""
    for name, short in (("random draft", False), ("answers of 16 tokens", True)):
        yield name, pooled(figures_of([panel for panel in panels if (FULL_PRICED not in panel.arms) == short]))


def hard_for_trees(panels: Sequence[Panel]) -> str:
    """A draft that knows nothing, and short answers, by length."""
    lines = {}
    for name, rows in _kinds_of_hard(panels):
        for length, line in _cells(rows, 0.8, _both).items():
            lines[f"{name}, {length}"] = {"prompts": line.pop("prompts"), "AR": line.pop("AR")} | {
                of: line.get(of, "–") for arm, of in ARMS.items() if arm in (PAPERS, FULL_PRICED, PRICED)
            }
    return lines_of(lines, "temperature 0.8")


def _judge_cpu(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    least = min(row["speedup_decode"]["smallest"] for row in rows if row["arm"] == PRICED)
    greedy = [_row(rows, PRICED, length, 0.0)["speedup_decode"]["mean"] for length in ("512", "1K", "4K", "8K", "16K")]
    return (
        "Where every node of a tree costs time, the tree has to earn it: at temperature 0.8 fixed trees are slower "
        "than AR, priced ones level with it or a little faster, and single prompts can lose: the slowest decodes at "
        f"{least:.2f} of AR. At temperature 0 they decode at {min(greedy):.2f} to {max(greedy):.2f} of it."
    )


def _judge_published_cpu(panels: Sequence[Panel], rows: Sequence[Row]) -> str:
    least = min(row["speedup_decode"]["smallest"] for row in rows if row["arm"] == PRICED)
    whole = [_row(rows, "standard:tree=price", "2K", temperature)["speedup"]["mean"] for temperature in (0.7, 0.0)]
    return (
        f"Every answer is AR's, token for token. The slowest prompt decodes at {least:.2f} of AR. Reading 2K with "
        f"dense attention costs standard more than its trees earn: {whole[0]:.2f} and {whole[1]:.2f} of AR end to end."
    )


def _published(*parts: str) -> tuple[str, ...]:
    return tuple(f"h200/smollm2/smollm2_{head}.jsonl" for head in parts)


CLASSIC = tuple(f"h200/classic/classic_{lengths}.jsonl" for lengths in ("1K_4K", "2K_8K", "16K"))
CHAPTERS = (
    Chapter(
        "A published model with an EAGLE-3 head",
        _published("eagle3_standard_t0.7", "eagle3_t0", "eagle3_t0_1K_4K"), {"smollm2_eagle3_t0.7": 0.7},
        _judge_published,
        beside=Beside(
            "the paper's table 5 (Llama-3.1-8B with an EAGLE-3 head)", partial(table_5, "eagle3"),
            _published("eagle3_standard"),
        ),
        again="h200/smollm2/smollm2_eagle3.jsonl",
    ),
    Chapter(
        "The same with an EAGLE-1 head", _published("eagle1", "eagle1_1K", "eagle1_t0", "eagle1_t0_1K_4K"), {},
        _judge_published, (),
    ),
    Chapter(
        "The bundled pair at the size of Vicuna-7B and 68M", CLASSIC, {"classic_t0.8": 0.8}, _judge_bundled,
        beside=Beside("the paper's table 2 (Vicuna-7B with Vicuna-68M)", partial(table_2, "vicuna_68m")),
        beside_vllm=True,
    ),
    Chapter(
        "Each part alone, other methods, the working cache",
        (*(f"h200/classic/{name}.jsonl" for name in ("ablation", "rivals", "sweep")), *CLASSIC), {}, _judge_tables,
        (),
    ),
    Chapter(
        "The bundled target with its EAGLE-1 head at that size",
        ("h200/eagle1/eagle1_1K_4K.jsonl", "h200/eagle1/eagle1_2K_8K.jsonl", "h200/eagle1/eagle1_16K.jsonl"), {},
        _judge_bundled_head, (),
        Beside("the paper's rows with an EAGLE head (table 2, Vicuna-7B)", partial(table_2, "eagle")),
    ),
    Chapter(
        "Inputs of 32K and 128K tokens", ("h200/long/long_32K.jsonl", "h200/long/long_128K.jsonl"), {},
        _judge_long_inputs, (),
    ),
    Chapter("Long answers, with an EAGLE-3 head", ("h200/aime/aime24_eagle3.jsonl",), {}, _judge_long),
    Chapter(
        "What is hard for priced trees", ("h200/classic/random_draft.jsonl", "h200/classic/short_answers.jsonl"), {},
        _judge_hard, (),
    ),
    Chapter(
        "The published model on two CPU cores",
        tuple(f"cpu/smollm2/smollm2_cpu{lengths}.jsonl" for lengths in ("", "_4K")), {}, _judge_published_cpu,
    ),
    Chapter(
        "The bundled pair on two CPU cores",
        tuple(f"cpu/policy/policy{lengths}.jsonl" for lengths in ("", "_8K", "_16K")), {}, _judge_cpu, (0.8,),
        again="cpu/policy/policy_before.jsonl",
    ),
)  # fmt: skip


def threats() -> list[str]:
    """What did not come out as in the paper, and what the figures above do not show."""
    record = json.loads((TRAINED / "training_record.json").read_text(encoding="utf-8"))
    said = _listed(THREATS)
    for name, head in (("AGREE_1", "eagle1"), ("AGREE_3", "eagle3")):
        said = said.replace(name, f"{record[head]['training']['validation'][-1]['same_argmax_1']:.2f}")
    return [f"## What did not reproduce\n\n{_listed(NOT_REPRODUCED)}", f"## Threats to validity\n\n{said}"]


def _listed(points: Sequence[str]) -> str:
    return "\n".join(f"- {point}" for point in points)


def figures(results: Path) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each chapter that has one."""
    for chapter in told(results):
        if chapter.figures:
            manifest, panels = read_chapter(results, chapter)
            arms = {arm: method for arm, method in _methods(results, chapter).items() if arm in ARMS}
            for name, temperature in chapter.figures.items():
                here = [row for row in pooled(figures_of(panels)) if row["temperature"] == temperature]
                title = f"{_about(manifest, panels)} Temperature {temperature:g}."
                yield name, by_length(here, arms, title)


def _methods(results: Path, chapter: Chapter) -> dict[str, dict[str, str]]:
    """The method of every arm of a chapter."""
    settings = [read_panels(results / name)[0]["setting"] for name in chapter.journals]
    return {arm: one["method"] for setting in settings for arm, one in _renamed(setting["arms"]).items()}


# --- quotations -----------------------------------------------------------------------------------------------------


def _quotations(results: Path) -> Iterator[str]:
    """Retrieval against a window where the answer refers back."""
    lines: dict[str, dict[str, str]] = {}
    for _, content in read_documents(results, "quotations_*.json"):
        frame = frame_of_scores(content["records"])
        name = f"{Path(content['setting']['draft']).name}, {frame['length'].iloc[0]}"
        lines[name] = {"prompts": str(frame["sample"].nunique())} | acceptance(frame[frame["answer"] == FORCED])
    if lines:
        yield (
            "## Where retrieval wins, and where it does not\n\nOn summaries retrieval and a window of the same size "
            "tie. Here the answer refers back: quote a paragraph, continue one, find a needle, at five depths of the "
            "document, and is forced to be the true one (SmolLM2, float16, temperature 0; accepted drafts per round, "
            "and CMR less window with 95 % interval):"
        )
        yield lines_of(lines, "head, length")
        yield (
            "With 8 chunks and the true answer retrieval gains a little, most for EAGLE-3 and for needles, far from "
            "the 1.5 times that was hoped for; on the model's own answers, which rarely quote what they are asked to, "
            "it gains nothing. Prompt lookup is the best draft of such text. By depth and task, and answered freely: "
            "[quotations](tables/quotations.md)."
        )


def acceptance(rows: pd.DataFrame) -> dict[str, str]:
    """Accepted per round of each cache, and what retrieval adds to a window of its size."""
    sums = rows.groupby("cache")[["accepted", "rounds"]].sum()
    rates = sums["accepted"] / sums["rounds"]
    wide = rows.assign(rate=rows["accepted"] / rows["rounds"].clip(lower=1)).pivot(
        index="sample", columns="cache", values="rate"
    )
    found = {"full": cell(rates["full"]), "prompt lookup": cell(rates["lookup"])}
    for size in (8, 32):
        gain = interval((wide[f"CMR {size}"] - wide[f"window {size}"]).dropna().to_numpy())
        found[f"window → CMR, {size} chunks"] = (
            f"{cell(rates[f'window {size}'])} → {cell(rates[f'CMR {size}'])} "
            f"({gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}])"
        )
    return found
