"""Arms against each other, from the journals of evaluations with --arms: a page of tables each, and figures.

    python -m scripts.report.evidence results/gpu                       # every such journal under a folder
    python -m scripts.report.evidence a.jsonl --output results/tables/a.md --figures results/figures
    python -m scripts.report.evidence results --check                   # exit status 1 where a page is out of date

Pages go to results/tables/<journal's name>.md unless --output says otherwise: a file for one journal, else a folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from scripts.report.evidence_plots import evidence_figures
from scripts.report.markdown import lines_of
from scripts.report.records import attempt, models_and_place
from scripts.report.style import LAYOUT, save
from specextend.cli import flags
from specextend.data.prompts import nominal_tokens
from specextend.errors import ConfigError, InputError
from specextend.evaluation.panel import Panel
from specextend.evaluation.panel_figures import ENOUGH, POOLED, figures_of, paired_ratio, pooled, read_panels

Row = dict[str, Any]
TABLES = Path("results/tables")
LEGEND = (
    "Every prompt was answered by every arm and once autoregressively (AR), one after the other in one process, in an "
    "order that is turned round on the next prompt. *Speed-up*: over that AR, mean of the prompts' own ratios; "
    "*accepted*: draft tokens kept per round, the bonus token excluded, mean over prompts; both with their 95 % "
    "bootstrap interval (10,000 resamples of the prompts). *Loop*: the last 64 tokens of an answer repeat 32 or fewer."
)


def main() -> None:
    args = parse_args()
    pages = {path: page_of(*read_panels(path), path) for path in journals_in(args.journals)}
    names = names_of([*pages])
    outputs = {path: output_of(names[path], args.output, len(pages)) for path in pages}
    if args.check:
        stale = [str(outputs[path]) for path, page in pages.items() if not _holds(outputs[path], page)]
        print(json.dumps({"checked": [str(output) for output in outputs.values()], "stale": stale}))
        sys.exit(1 if stale else 0)
    written = []
    for path, page in pages.items():
        outputs[path].parent.mkdir(parents=True, exist_ok=True)
        outputs[path].write_text(page, encoding="utf-8")
        written.append(str(outputs[path]))
        if args.figures:
            plt.rcParams.update(LAYOUT)
            args.figures.mkdir(parents=True, exist_ok=True)
            for kind, figure in evidence_figures(*read_panels(path)):
                written += save(figure, args.figures / f"{kind}_{names[path]}")
    print(json.dumps({"written": written}))


def parse_args() -> argparse.Namespace:
    parser = flags.parser(__doc__.splitlines()[0])
    parser.add_argument("journals", nargs="+", type=Path, help="journals (.jsonl), or folders of them")
    parser.add_argument("--output", type=Path, help=f"page, or folder of pages (without it {TABLES})")
    parser.add_argument("--figures", type=Path, help="folder for figures; without it none are drawn")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    return parser.parse_args()


def journals_in(paths: Sequence[Path]) -> list[Path]:
    """The journals of several arms among files and under folders; InputError where there is none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += [one for one in sorted(path.rglob("*.jsonl")) if attempt(one, lambda one=one: has_arms(one))]
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"{path} does not exist")
    if not found:
        shown = ", ".join(map(str, paths))
        raise InputError(f"there is no journal of several arms under {shown}; eval_classic.py --arms writes one")
    return [*dict.fromkeys(found)]


def has_arms(path: Path) -> bool:
    """Whether a journal's lines are panels."""
    with path.open(encoding="utf-8") as lines:
        first = lines.readline()
    return first.endswith("\n") and "arms" in json.loads(first).get("setting", {})


def names_of(journals: Sequence[Path]) -> dict[Path, str]:
    """A name for each: the file's, with the folder's before it where two files are called alike."""
    stems = [path.stem for path in journals]
    return {
        path: path.stem if stems.count(path.stem) == 1 else f"{path.resolve().parent.name}_{path.stem}"
        for path in journals
    }


def output_of(name: str, output: Path | None, journals: int) -> Path:
    if output is not None and output.suffix == ".md":
        if journals > 1:
            raise ConfigError(f"--output {output} is one page for {journals} journals; name a folder")
        return output
    return (output or TABLES) / f"{name}.md"


def _holds(path: Path, page: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == page


# --- a page ---------------------------------------------------------------------------------------------------------


def page_of(manifest: dict[str, Any], panels: Sequence[Panel], journal: Path) -> str:
    """The page of one journal."""
    setting = manifest["setting"]
    if not panels:
        raise InputError(f"{journal} holds no panel yet")
    rows = figures_of(panels)
    data = [*dict.fromkeys(panel.data for panel in panels)]
    parts = [
        f"# {journal.stem}",
        f"Written by `scripts.report.evidence` from {journal.name}; do not edit.",
        f"{models_and_place(setting, manifest['environment'])}; AR on {setting['backend']}; "
        f"{', '.join(data)}; up to {setting['max_gen_len']} new tokens." + _eager(setting) + _clocks(panels),
        LEGEND + _few(rows),
    ]
    for temperature in dict.fromkeys(row["temperature"] for row in rows):
        parts.append(f"## Temperature {temperature:g}")
        at = [panel for panel in panels if panel.temperature == temperature]
        parts += _tables([row for row in rows if row["temperature"] == temperature], at)
    return "\n\n".join(parts) + "\n"


def _tables(rows: Sequence[Row], panels: Sequence[Panel]) -> Iterator[str]:
    """The tables of one temperature."""
    together = pooled(rows)
    drafting = [row for row in together if not row["arm"].startswith("autoregressive")]
    yield _titled("Decoding speed-up", together, lambda row: _bracketed(row["speedup_decode"]))
    if drafting:
        yield _titled(
            "Accepted draft tokens per round (of all rounds together)", drafting,
            lambda row: f"{_bracketed(row['accepted'])} ({_number(row['accepted']['total'])})",
        )  # fmt: skip
    yield _titled("End-to-end speed-up, prefill included", together, lambda row: _bracketed(row["speedup"]))
    against = _against([row["arm"] for row in together])
    if against:
        yield _paired_table(against, together, panels)
    yield _titled(
        "Decoding, tokens per second (over AR, both of all prompts together)", together,
        lambda row: f"{_number(row['decode_tokens_per_s'], 1)} ({_number(row['speedup_decode']['total'])})",
        first=("AR", lambda row: _number(row["ar_decode_tokens_per_s"], 1)),
    )  # fmt: skip
    yield _titled(
        "Smallest decoding speed-up of a prompt; prompts whose tokens are those of AR", together,
        lambda row: f"{_number(row['speedup_decode']['smallest'])}; {row['equal']} of {row['prompts']}",
    )  # fmt: skip
    parted = [row for row in together if row["gap"] is not None]
    if parted:
        gap = max(row["gap"] for row in parted)
        yield (
            f"The other answers part where the target scores the two tokens {gap:.4f} apart at most (in logits, "
            "read again in one pass)."
        )
    if any(row["loops"] for row in together):
        yield _titled(
            "Answers that loop; distinct 4-grams", together,
            lambda row: f"{row['loops']:.0%}; {row['distinct_4grams']:.2f}",
        )  # fmt: skip
        clean = [row | row["without_loops"] for row in together if row["without_loops"]]
        if clean:
            yield _titled(
                "Without prompts on which an answer loops: decoding speed-up; accepted", clean,
                lambda row: f"{_bracketed(row['speedup_decode'])}; {_number(row['accepted']['mean'])}",
            )  # fmt: skip
    priced = [row for row in together if row["price"]]
    if priced:
        yield _titled("Share of rounds without speculation", priced, lambda row: f"{row['plain_share']:.0%}")
    apart = [row for row in rows if row["data"] != POOLED]
    if len({row["data"] for row in apart}) > 1:
        yield _titled(
            "By data set: decoding speed-up; accepted", apart,
            lambda row: f"{_bracketed(row['speedup_decode'])}; {_number(row['accepted']['mean'])}", by_data=True,
        )  # fmt: skip


def _titled(
    title: str, rows: Sequence[Row], cell: Callable[[Row], str], *,
    first: tuple[str, Callable[[Row], str]] | None = None, by_data: bool = False,
) -> str:  # fmt: skip
    """A table of lengths by arms below its title."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        name = f"{row['length']} {row['data']}" if by_data else row["length"]
        line = lines.setdefault(name, {"prompts": str(row["prompts"])} | ({first[0]: first[1](row)} if first else {}))
        line[f"`{row['arm']}`"] = cell(row)
    return f"{title}:\n\n{lines_of(lines)}"


def _paired_table(against: str, rows: Sequence[Row], panels: Sequence[Panel]) -> str:
    """Decoding rates over those of one arm, on the same prompts."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["arm"] != against:
            here = [panel for panel in panels if panel.bucket == row["length"]]
            ratio = paired_ratio(here, row["arm"], against, "speedup_decode")
            line = lines.setdefault(row["length"], {"prompts": str(ratio.prompts)})
            line[f"`{row['arm']}`"] = _interval(ratio.mean, ratio.low, ratio.high)
    return f"Decoding rate over that of `{against}`, mean of the prompts' own ratios:\n\n{lines_of(lines)}"


def _against(arms: Sequence[str]) -> str | None:
    """What the other arms are compared with: standard decoding, else the first that was listed."""
    arms = [*dict.fromkeys(arms)]
    if len(arms) < 2:
        return None
    return "standard" if "standard" in arms else arms[0]


def _eager(setting: dict[str, Any]) -> str:
    """Which arms ran on another backend than the baseline."""
    others = [f"`{name}`" for name, arm in setting["arms"].items() if arm["backend"] != setting["backend"]]
    return f" On plain PyTorch instead: {', '.join(others)}." if others else ""


def _clocks(panels: Sequence[Panel]) -> str:
    """What the GPU's clocks were, where somebody asked."""
    states = pd.DataFrame([panel.gpu for panel in panels if panel.gpu])
    if states.empty:
        return ""
    low, high = states["sm_mhz"].min(), states["sm_mhz"].max()
    return f" GPU clocks {low:.0f} to {high:.0f} MHz, memory {states['memory_mhz'].max():.0f} MHz."


def _few(rows: Sequence[Row]) -> str:
    few = [row["length"] for row in pooled(rows) if row["prompts"] < ENOUGH]
    few = sorted(set(few), key=nominal_tokens)
    return f" Fewer than {ENOUGH} prompts: {', '.join(few)}." if few else ""


def _bracketed(figure: Row) -> str:
    return _interval(figure["mean"], figure["low"], figure["high"])


def _interval(mean: float | None, low: float | None, high: float | None) -> str:
    return _number(mean) if low is None else f"{_number(mean)} [{_number(low)}, {_number(high)}]"


def _number(value: float | None, digits: int = 2) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    flags.run(main)
