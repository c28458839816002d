"""The report's first part: what was asked, and what the journals of several arms answer.

Every number is computed from the journals; what a sentence claims beyond that, `tests/scripts/test_story.py` checks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from scripts.report import judgements, quotations
from scripts.report.arms import ARMS, FIXED, FULL_PRICED, PAPERS, PRICED, STANDARD
from scripts.report.beside import (
    Papers,
    beside_standard,
    measured_again,
    table_2,
    table_5,
)
from scripts.report.evidence import journals_in
from scripts.report.evidence_plots import by_length
from scripts.report.judgements import alternating, kinds_of_hard, row_of, speed_of
from scripts.report.markdown import lines_of
from scripts.report.records import models_and_place
from scripts.report.vllm import autoregressive_rates
from specextend.data.prompts import nominal_tokens
from specextend.evaluation.panel import Panel
from specextend.evaluation.panel_figures import figures_of, pooled, read_panels

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
    "16 to 27 prompts per length from three data sets (7 and 9 with the random draft, 7 for the working cache, "
    "5 at 16K on a CPU, 3 or 4 for inputs beyond 16K, long answers, each part alone and other methods), one run each, "
    "with EAGLE-3 on the published model two; answers of at most 200 tokens (8,000 the long ones). Intervals are over "
    "prompts.",
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
        temperatures: those that have a table of all arms here; None: all.
        beside: a table of the paper.
        again: journals of the same prompts at another time.
        mixed: journals have other arms each at the same length, so that there are no figures of all together.
        beside_vllm: vLLM has decoded this pair on such a machine, too; the README shows the lengths of both.
    """

    title: str
    journals: tuple[str, ...]
    figures: Mapping[str, float]
    judge: Callable[[Sequence[Panel], Sequence[Row]], str]
    temperatures: tuple[float, ...] | None = None
    beside: Beside | None = None
    again: tuple[str, ...] = ()
    mixed: bool = False
    beside_vllm: bool = False

    @property
    def all_journals(self) -> tuple[str, ...]:
        return self.journals + (self.beside.journals if self.beside else ()) + self.again


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
    yield from quotations.sections(results)


def headlines(results: Path) -> Iterator[str]:
    """The tables of the README: of each chapter that is drawn, the highest temperature."""
    for chapter in told(results):
        if chapter.figures:
            manifest, panels = read_chapter(results, chapter)
            rows = rows_of(chapter, panels)
            highest = rows[0]["temperature"]
            yield f"{chapter.title}, temperature {highest:g}: {_about(manifest, panels)}"
            lines = _cells(rows, highest, speed_of)
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
    """Figures of all data sets together; none where journals have other arms each."""
    return [] if chapter.mixed else pooled(figures_of(panels))


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
    return f"{speed_of(row)}; {row['accepted']['mean']:.2f}"


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


def measured_before(results: Path, chapter: Chapter, panels: Sequence[Panel]) -> str:
    """What priced trees gained when the same prompts were measured at another time, and how far prompts are apart."""
    _, before = _read(results, chapter.again)
    rows = [row for row in pooled(figures_of(before)) if row["arm"] == PRICED]
    highest = max(row["temperature"] for row in rows)
    there = sorted(
        (row for row in rows if row["temperature"] == highest), key=lambda row: nominal_tokens(row["length"])
    )
    said = ", ".join(f"{speed_of(row)} at {row['length']}" for row in there)
    answers, median, most = measured_again(before, panels, PRICED)
    return (
        f"Measured at another time, priced trees gained {said}; of the {answers} answers that both have, the speed-up "
        f"differs by {median:.1%} (median) and at most {most:.0%}."
    )


def fixed_trees(results: Path) -> Iterator[str]:
    """Sections of a page of its own, priced trees beside fixed ones; nothing where no such journals are there."""
    chapters = {chapter.judge: chapter for chapter in told(results)}
    if judgements.bundled in chapters and (results / SHORTEST).exists():
        manifest, panels = _read(results, (SHORTEST, *CLASSIC))
        yield (
            f"{_about(manifest, panels)}\n\nDecoding over AR, mean of the prompts' own ratios, at temperature 0.8 and "
            "0: three trees of fixed bounds (50 nodes) and priced ones. *Alternating*: the prompts that were answered "
            "at both temperatures in turns, all tokens over all seconds, priced trees over the best of the fixed.\n\n"
            f"{beside_fixed(panels, pooled(figures_of(panels)))}"
        )
    if chapter := chapters.get(judgements.hard):
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
            f"{temperature:g}: {name}": f"{row_of(rows, arm, length, temperature)['speedup_decode']['mean']:.2f}"
            for temperature in (0.8, 0.0)
            for arm, name in (FIXED | {PRICED: "priced"}).items()
        }
        best = max(alternating(panels, arm, length) for arm in FIXED)
        lines[length]["alternating: priced over the best"] = f"{alternating(panels, PRICED, length) / best:.2f}"
    return lines_of(lines)


def hard_for_trees(panels: Sequence[Panel]) -> str:
    """A draft that knows nothing, and short answers, by length."""
    lines = {}
    for name, rows in kinds_of_hard(panels):
        for length, line in _cells(rows, 0.8, _both).items():
            lines[f"{name}, {length}"] = {"prompts": line.pop("prompts"), "AR": line.pop("AR")} | {
                of: line.get(of, "–") for arm, of in ARMS.items() if arm in (PAPERS, FULL_PRICED, PRICED)
            }
    return lines_of(lines, "temperature 0.8")


def _published(*parts: str) -> tuple[str, ...]:
    return tuple(f"h200/smollm2/smollm2_{head}.jsonl" for head in parts)


CLASSIC = tuple(f"h200/classic/classic_{lengths}.jsonl" for lengths in ("1K_4K", "2K_8K", "16K"))
SHORTEST = "h200/classic/classic_512.jsonl"  # without standard: beside the fixed trees alone
CHAPTERS = (
    Chapter(
        "A published model with an EAGLE-3 head",
        _published("eagle3_standard_t0.7", "eagle3_t0", "eagle3_t0_1K_4K"), {"smollm2_eagle3_t0.7": 0.7},
        judgements.published,
        beside=Beside(
            "the paper's table 5 (Llama-3.1-8B with an EAGLE-3 head)", partial(table_5, "eagle3"),
            _published("eagle3_standard"),
        ),
        again=_published("eagle3"),
    ),
    Chapter(
        "The same with an EAGLE-1 head", _published("eagle1", "eagle1_1K", "eagle1_t0", "eagle1_t0_1K_4K"), {},
        judgements.published, (),
    ),
    Chapter(
        "The bundled pair at the size of Vicuna-7B and 68M", CLASSIC, {"classic_t0.8": 0.8}, judgements.bundled,
        beside=Beside("the paper's table 2 (Vicuna-7B with Vicuna-68M)", partial(table_2, "vicuna_68m")),
        beside_vllm=True,
    ),
    Chapter(
        "Each part alone, other methods, the working cache",
        (*(f"h200/classic/{name}.jsonl" for name in ("ablation", "rivals", "sweep")), *CLASSIC), {}, judgements.tables,
        (), mixed=True,
    ),
    Chapter(
        "The bundled target with its EAGLE-1 head at that size",
        ("h200/eagle1/eagle1_1K_4K.jsonl", "h200/eagle1/eagle1_2K_8K.jsonl", "h200/eagle1/eagle1_16K.jsonl"), {},
        judgements.bundled_head, (),
        Beside("the paper's rows with an EAGLE head (table 2, Vicuna-7B)", partial(table_2, "eagle")),
    ),
    Chapter(
        "Inputs of 32K and 128K tokens", ("h200/long/long_32K.jsonl", "h200/long/long_128K.jsonl"), {},
        judgements.long_inputs, (),
    ),
    Chapter("Long answers, with an EAGLE-3 head", ("h200/aime/aime24_eagle3.jsonl",), {}, judgements.long_answers),
    Chapter(
        "What is hard for priced trees", ("h200/classic/random_draft.jsonl", "h200/classic/short_answers.jsonl"), {},
        judgements.hard, (), mixed=True,
    ),
    Chapter(
        "The published model on two CPU cores",
        tuple(f"cpu/smollm2/smollm2_cpu{lengths}.jsonl" for lengths in ("", "_4K")), {}, judgements.published_cpu,
        (0.7,),
    ),
    Chapter(
        "The bundled pair on two CPU cores",
        tuple(f"cpu/policy/policy{lengths}.jsonl" for lengths in ("", "_8K", "_16K")), {}, judgements.cpu, (0.8,),
        again=("cpu/policy/policy_before.jsonl", "cpu/policy/policy_8K_16K.jsonl"),
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
