"""Markdown tables from the records under results/: standard and SpecExtend side by side.

    python -m scripts.report.tables                      # writes results/REPORT.md and results/tables/
    python -m scripts.report.tables --html               # and REPORT.html, one file with the figures in it
    python -m scripts.report.tables --readme README.md   # and the headline between the README's results markers

A table shows what was measured under one setting: same folder, data, models, dtype, hardware (and how many workers
shared it), tree, new tokens and temperature. Further methods of that setting follow below it, by length; then the
paper's figures beside ours, the needles and the analyses.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pandas as pd

from scripts.report import quotations, story
from scripts.report.gpu import reports as gpu_reports
from scripts.report.markdown import Column, cell, markdown, table_of
from scripts.report.page import html_report
from scripts.report.paper import analysis_tables, needle_gains, needle_table, tables_beside
from scripts.report.quotations import frame_of_scores
from scripts.report.records import (
    PAIR,
    RUN,
    SPECEXTEND,
    STANDARD,
    attempt,
    by,
    figures_of,
    leads,
    pivot,
    read_documents,
    read_records,
    shared,
    title_of,
    title_of_document,
)
from scripts.report.vllm import vllm_reports
from specextend.cli import flags
from specextend.errors import InputError

NAIVE = "autoregressive_hf"
WRITTEN = "Written by `scripts.report.tables` from the files named below; do not edit."
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
LEGEND = (
    "*Accepted*: draft tokens kept per round, the bonus token excluded (the paper's tau). *Tokens/round*: the bonus "
    "token included; autoregressive decoding (AR) has 1. *Decode*: after the first token. *Speed-up*: against AR on "
    "the same prompts in the same process. *Ratio*: SpecExtend over standard. *Equal*: samples whose tokens are those "
    "of AR, of all. Standard and SpecExtend are compared on the prompts that both have answered."
)
NEEDLES = (
    "A fact stated far back and asked for at the end; answer tokens that the draft also gets right where the fact is "
    "not stated are left out. The paper does not say how long its contexts are."
)
ANALYSED = "divergence", "entropy", "chunks", "sweep", "equation1"  # figures of the analyses (`analysis_plots.py`)
COMPARED = [  # heading, figure, digits, whether with the ratio
    ("accepted", "avg_accept_length", 2, True),
    ("tokens/round", "tokens_per_round", 2, False),
    ("decode tok/s", "decode_tokens_per_sec", 1, False),
    ("decode speed-up", "speedup_decode", 2, True),
    ("end-to-end speed-up", "speedup", 2, True),
]
BY_LENGTH = [  # what a table of all methods says, its figure, those in brackets, digits
    ("Draft tokens accepted per round:", "avg_accept_length", [], 2),
    ("Decode speed-up over our autoregressive loop:", "speedup_decode", [], 2),
    (
        "End-to-end speed-up over our autoregressive loop, ratio of totals (mean of the samples' ratios):",
        "speedup", ["speedup_mean_of_ratios"], 2,
    ),
    (
        "Speed-up over Hugging Face's eager `generate`, end to end (decoding), each against our loop beside it, on the "
        "prompts that both have answered:", "over_naive", ["decode_over_naive"], 2,
    ),
    ("Seconds to the first token:", "ttft_s", [], 2),
    (
        "Milliseconds per token while decoding, median (90th, 99th percentile):",
        "token_ms.p50", ["token_ms.p90", "token_ms.p99"], 1,
    ),
    ("Peak GPU memory, GB:", "peak_gb", [], 2),
    ("Samples whose tokens are those of autoregressive decoding, of all:", "equal", [], 0),
]  # fmt: skip


def main() -> None:
    args = parse_args()
    records = read_records(args.results)
    shown = list(story.headlines(args.results)) or [short_report(records), LEGEND]
    readme = args.readme and filled(args.readme, "\n\n".join(shown))
    pages = tables_of(records) | document_pages(args.results)
    report = full_report(records, args.results, [*pages, *story.pages_apart(args.results)])
    written = [args.results / "REPORT.md"]
    written[0].write_text(report, encoding="utf-8")
    for name, page in pages.items():
        written.append(args.results / name)
        written[-1].parent.mkdir(exist_ok=True)
        written[-1].write_text(page, encoding="utf-8")
    if args.html:
        everything = "\n".join((report, *pages.values()))
        written.append(args.results / "REPORT.html")
        written[-1].write_text(html_report(everything, args.results / "figures"), encoding="utf-8")
    if readme:
        written.append(args.readme)
        args.readme.write_text(readme, encoding="utf-8")
    print(json.dumps({"files": sorted(records["file"].unique()), "written": [str(path) for path in written]}))


def parse_args() -> argparse.Namespace:
    parser = flags.parser(__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records")
    parser.add_argument("--html", action="store_true", help="also REPORT.html, with the figures inside it")
    parser.add_argument("--readme", type=Path, help="file whose text between the results markers is replaced")
    return parser.parse_args()


def tables_of(records: pd.DataFrame) -> dict[str, str]:
    """A page for every folder of records, by its name under the results: every method, and the paper's beside ours."""
    pages = {}
    for folder, of_folder in records.groupby("folder"):
        parts = [f"# Tables of {folder}", WRITTEN, LEGEND]
        for run, of_run in by(of_folder, RUN):
            parts.append(f"## {title_of(run)}")
            for first, rows in by(of_run, ["data", "temperature"]):
                parts += [f"### {first['data']}, temperature {first['temperature']:g}", side_by_side(rows)]
                if set(rows["method"]) - set(PAIR):
                    parts += all_methods(rows)
                parts += tables_beside(rows)
                sources = ", ".join(f"[{file}](../{file})" for file in sorted(rows["file"].unique()))
                versions = "; ".join(sorted(rows["versions"].unique()))
                parts.append(f"{samples_of(figures_of(rows))} samples per length, {versions}. Files: {sources}.")
        name = "all" if folder == "." else str(folder).replace("/", "-")
        pages[f"tables/{name}.md"] = "\n\n".join(parts) + "\n"
    return pages


def full_report(records: pd.DataFrame, results: Path, pages: Iterable[str]) -> str:
    told = list(story.sections(results))
    parts = ["# Results", WRITTEN, *(told or [LEGEND, "## At a glance", short_report(records)])]
    parts += [f"## Beside vLLM\n\n{section}" for section in vllm_reports(results)]
    parts += document_sections(results, "Needles", "needle.json", _needles)
    parts += story.threats() if told else []
    parts.append(f"Further pages: {', '.join(f'[{Path(page).stem}]({page})' for page in pages)}.")
    return "\n\n".join(parts) + "\n"


def document_pages(results: Path) -> dict[str, str]:
    """Pages of what is no evaluation: the analyses with their figures, and the quotations."""
    quoted = document_sections(results, "Quotations", "quotations_*.json", _quoted, up="../")
    analysed = document_sections(results, "Analyses", "analysis.json", analysis_tables, up="../")
    drawn = sorted(path for part in ANALYSED for path in (results / "figures").glob(f"{part}_*.svg"))
    analysed += [f"![{path.stem}](../figures/{path.name})" for path in drawn] if analysed else []
    pages = {
        "analyses": ("# Analyses", analysed),
        "quotations": ("# Answers that refer back", quoted),
        "policy_h200": ("# Priced trees beside fixed ones", [*story.fixed_trees(results)]),
        "gpu": ("# What a round costs", gpu_reports(results)),
    }
    return {
        f"tables/{name}.md": "\n\n".join([title, WRITTEN, *sections]) + "\n"
        for name, (title, sections) in pages.items() if sections
    }  # fmt: skip


def _needles(content: dict) -> list[str]:
    return [f"{NEEDLES} {needle_gains(content)}", needle_table(content)]


def _quoted(content: dict) -> list[str]:
    return [quotations.tables(frame_of_scores(content["records"]))]


def document_sections(
    results: Path, title: str, name: str, make: Callable[[dict], list[str]], *, up: str = ""
) -> list[str]:
    """A section for each file called `name` under the results, to which `up` leads from where the page lies."""
    parts = []
    for path, content in read_documents(results, name):
        file = path.relative_to(results).as_posix()
        section = attempt(path, lambda c=content: [f"## {title}: {title_of_document(c)}", *make(c)])
        parts += [*section, f"File: [{file}]({up}{file})."] if section else []
    return parts


def samples_of(figures: pd.DataFrame) -> str:
    """`4`, or `2 to 6`."""
    return " to ".join(str(count) for count in dict.fromkeys((figures["samples"].min(), figures["samples"].max())))


def side_by_side(records: pd.DataFrame) -> str:
    """Standard and SpecExtend, each length on the prompts that both have answered."""
    figures = figures_of(shared(records, PAIR))
    if figures.empty:
        return "Neither standard nor SpecExtend was measured."
    first = figures.drop_duplicates("length").set_index("length")
    wide = pd.DataFrame({"prompt tokens": first["prompt_tokens.mean"]})
    wide["AR"] = pivot(figures, "autoregressive.decode_tokens_per_sec")[list(PAIR)].mean(axis="columns")
    columns = [Column("prompt tokens", "prompt tokens", 0)]
    for heading, name, digits, with_ratio in COMPARED:
        if name == "decode_tokens_per_sec":
            columns.append(Column("decode tok/s: AR", "AR", 1))
        table = pivot(figures, name)
        table["ratio"] = table[SPECEXTEND] / table[STANDARD]
        wide = wide.join(table.add_prefix(f"{name}: "))
        shown = {"standard": STANDARD, "SpecExtend": SPECEXTEND} | ({"ratio": "ratio"} if with_ratio else {})
        columns += [
            Column(f"{heading}: {label}", f"{name}: {of}", 2 if of == "ratio" else digits)
            for label, of in shown.items()
        ]
    equal = figures.assign(equal=equality(figures)).pivot(index="length", columns="method", values="equal")
    wide = wide.join(equal.reindex(columns=list(PAIR)).add_prefix("equal: "))
    columns += [Column("equal: standard", "equal: standard"), Column("equal: SpecExtend", "equal: specextend")]
    return table_of(wide.rename_axis("length"), columns)


def equality(figures: pd.DataFrame) -> pd.Series:
    return figures["equal_to_autoregressive"].astype(str) + "/" + figures["samples"].astype(str)


def all_methods(records: pd.DataFrame) -> Iterator[str]:
    """Every method by length, a table per figure."""
    figures, lead = figures_of(records), leads(records)
    figures = figures.assign(equal=equality(figures), peak_gb=figures["peak_bytes"].astype(float) / 1e9)
    for rank in ("p50", "p90", "p99"):
        if f"token_s.{rank}" in figures:
            figures[f"token_ms.{rank}"] = 1e3 * figures[f"token_s.{rank}"]
    if NAIVE in set(figures["method"]):
        at_naive = set(figures.loc[figures["method"] == NAIVE, "length"])
        for column, name in (("over_naive", "speedup"), ("decode_over_naive", "speedup_decode")):
            figures[column] = [
                (1.0 if method == NAIVE else lead[name].get((method, NAIVE, length))) if length in at_naive else None
                for method, length in zip(figures["method"], figures["length"], strict=True)
            ]
    yield "All methods, each over all prompts it has answered (how many: the last table)."
    for said, name, more, digits in BY_LENGTH:
        if name not in figures or figures[name].isna().all():
            continue
        measured = figures.dropna(subset=name)
        texts = [[cell(value, digits) for value in row] for row in measured[[name, *more]].values.tolist()]
        cells = [one + f" ({', '.join(others)})" * bool(others) for one, *others in texts]
        table = measured.assign(cell=cells).pivot(index="method", columns="length", values="cell")
        yield said
        yield markdown(table.reindex(index=measured["method"].unique(), columns=measured["length"].unique()))
    yield fastest(figures.dropna(subset=["speedup", "speedup_decode"]), lead)


def fastest(figures: pd.DataFrame, lead: pd.DataFrame) -> str:
    """Which method wins at each length, decoding and end to end: whose smallest lead over another is largest."""

    def winner(length: str, methods: pd.Series, name: str) -> str:
        least = {
            one: min((lead[name].get((one, other, length), 1.0) for other in methods), default=1.0) for one in methods
        }
        return max(least, key=least.get)

    said = [
        f"{length}: {', '.join(winner(length, group['method'], name) for name in ('speedup_decode', 'speedup'))}"
        for length, group in figures.groupby("length", sort=False)
    ]
    return f"Fastest while decoding, and end to end, at {'; '.join(said)}." if said else "No speeds to compare."


# --- the README's short form ----------------------------------------------------------------------------------------


def short_report(records: pd.DataFrame) -> str:
    """Two tables, prompts by run, each cell standard and SpecExtend; then what the runs are."""
    measured = records[records["method"].isin(PAIR)]
    both = measured.groupby(RUN)["method"].transform("nunique") == 2
    figures = figures_of(shared(measured[both]))
    runs = {
        f"- `{Path(run['folder']).name}`: {title_of(run)}, {samples_of(rows)} prompts per length"
        for run, rows in by(figures, RUN)
    }
    parts = [
        "Draft tokens accepted per round, standard → SpecExtend:",
        arrows(figures, "avg_accept_length"),
        "Decode speed over autoregressive decoding, standard → SpecExtend:",
        arrows(figures, "speedup_decode"),
        "\n".join(sorted(runs)),
    ]
    return "\n\n".join(parts)


def arrows(figures: pd.DataFrame, name: str) -> str:
    """A table of a figure: one line per data set and length, one column per run and temperature."""
    cells: dict[str, dict[str, str]] = {}
    for (folder, temperature, data), rows in figures.groupby(["folder", "temperature", "data"]):
        for length, of in pivot(rows, name).iterrows():
            column = f"{Path(folder).name}, temperature {temperature:g}"
            cells.setdefault(column, {})[f"{data}, {length}"] = (
                f"{cell(of[STANDARD]) or '–'} → {cell(of[SPECEXTEND]) or '–'}"
            )
    lines = dict.fromkeys(line for column in cells.values() for line in column)
    return markdown(pd.DataFrame(cells, index=list(lines)).rename_axis("prompts"))


def filled(readme: Path, text: str) -> str:
    """The file with `text` between its markers; InputError where they are missing."""
    content = readme.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(END) < content.index(BEGIN):
        raise InputError(f"{readme} needs one {BEGIN} and one {END} after it; the results go between them")
    before, _, rest = content.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    flags.run(main)
