"""Markdown tables from the per-length files under results/: standard and SpecExtend side by side.

    python scripts/make_tables.py                      # writes results/REPORT.md
    python scripts/make_tables.py --html               # and REPORT.html, one file with the figures in it
    python scripts/make_tables.py --readme README.md   # and the short form between the README's results markers

A table shows what was measured under one setting: same folder, data, models, dtype, hardware (and how many workers
shared it), tree, new tokens and temperature. Further methods of that setting follow below it, by length; then the
paper's figures beside ours (`beside_paper.py`), the needles and the analyses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from beside_paper import analysis_tables, markdown, needle_table, tables_of
from gpu_tables import gpu_reports
from readings import METHODS, read_records, title_of_records
from report_html import html_report
from shared import lead, on_shared

STANDARD, SPECEXTEND, NAIVE = "standard", "specextend", "autoregressive_hf"
SPEEDUPS = ("speedup_decode", "speedup")
RUN = ["folder", "model", "draft", "dtype", "device", "hardware", "tree", "max_gen_len"]
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


def main() -> None:
    args = parse_args()
    figures = read_results(args.results)
    if figures.empty:
        sys.exit(f"no per-length files of eval_classic.py or eval_eagle.py under {args.results}")
    report = args.results / "REPORT.md"
    report.write_text(full_report(figures, args.results), encoding="utf-8")
    written = [str(report)]
    if args.html:
        page = report.with_suffix(".html")
        page.write_text(html_report(report.read_text(encoding="utf-8"), args.results / "figures"), encoding="utf-8")
        written.append(str(page))
    if args.readme:
        fill_readme(args.readme, "\n\n".join((*gpu_reports(args.results), short_report(figures))))
        written.append(str(args.readme))
    print(json.dumps({"files": sorted(set(figures["file"])), "written": written}))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the per-length files")
    parser.add_argument("--html", action="store_true", help="also REPORT.html, with the figures inside it")
    parser.add_argument("--readme", type=Path, help="file whose text between the results markers is replaced")
    return parser.parse_args()


# --- reading (plot_results.py reads through this too) ---------------------------------------------------------------


def read_results(results: Path) -> pd.DataFrame:
    """One row per file and nominal length, shortest first: the `RUN` columns, data, temperature, method, figures.

    Nested figures get dotted names: `prompt_tokens.mean`, `spread.speedup_decode.p10`.
    """
    rows = []
    for path in sorted(results.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "setting" not in content.get("manifest", {}):
            continue
        setting = _setting_columns(content.pop("manifest"))
        place = {"file": path.relative_to(results).as_posix(), "folder": path.parent.relative_to(results).as_posix()}
        place["journal"] = str(path.with_suffix(".jsonl"))
        for length, figures in content.items():
            # part of the hardware: workers side by side are slower than one alone, and no table mixes the two
            hardware = setting["hardware"] + _workers(figures.get("workers_on_host", [1]))
            rows.append({**place, **setting, "hardware": hardware, "length": length, **figures})
    if not rows:
        return pd.DataFrame()
    figures = pd.json_normalize(rows).astype({"prompt_tokens.mean": float})
    figures["tree"] = _tree_of_run(figures)
    figures["method"] = _distinct_methods(figures)
    order = figures["method"].map(lambda name: list(METHODS).index(name) if name in METHODS else len(METHODS))
    keys = [*RUN, "data", "temperature", "prompt_tokens.mean", "order", "file"]
    return figures.assign(order=order).sort_values(keys, ignore_index=True)


def _setting_columns(manifest: dict[str, Any]) -> dict[str, Any]:
    setting, environment = manifest["setting"], manifest["environment"]
    tree, hardware = setting["config"]["tree"], environment["hardware"]
    cpu = f"{hardware['cpu']} with {environment['threads']} of {hardware['cores']} cores"
    return {
        "data": setting["data"],
        "temperature": setting["sampling"]["temperature"],
        "method": setting["method"],
        "model": setting["model"],
        "draft": setting["draft"],
        "dtype": setting["dtype"],
        "device": setting["device"],
        "hardware": hardware["gpu"] if setting["device"] == "cuda" else cpu,
        "tree": _tree(tree) if setting["config"].get("draft", "model") == "model" else None,
        "max_gen_len": setting["max_gen_len"],
        "versions": f"torch {environment['torch']}, transformers {environment['transformers']}",
    }


def _workers(on_host: list[int]) -> str:
    """What is said of workers that shared a host, and nothing of one alone."""
    if on_host == [1]:
        return ""
    return f", {' or '.join(map(str, on_host))} workers per host" + (" (speeds do not compare)" * (len(on_host) > 1))


def _tree(tree: dict[str, Any]) -> str:
    floor = tree.get("min_probability")
    text = f"{tree['nodes']} nodes, depth {tree['max_depth']}, threshold {tree['threshold']:g}"
    return f"{text}, nodes reached with at least {floor:g}" if floor else text


def _tree_of_run(figures: pd.DataFrame) -> pd.Series:
    """Methods without a draft tree belong to the run whose folder they lie in."""
    others = [name for name in RUN if name != "tree"]
    return figures["tree"].fillna(figures.groupby(others)["tree"].transform("first")).fillna("chains")


def _distinct_methods(figures: pd.DataFrame) -> pd.Series:
    """The method's name, with the file's where two files of one setting share it."""
    twice = figures.duplicated([*RUN, "data", "temperature", "length", "method"], keep=False)
    twice = figures["file"].isin(figures.loc[twice, "file"])
    return figures["method"].mask(twice, figures["method"] + " (" + figures["file"] + ")")


def runs_of(figures: pd.DataFrame) -> Iterator[tuple[pd.Series, pd.DataFrame]]:
    """Settings, each with the rows measured under it."""
    for _, rows in figures.groupby(RUN, sort=False):
        yield rows.iloc[0], rows


def title_of(run: pd.Series) -> str:
    models = f"{run['model']} with {run['draft']}, {run['dtype']}, {run['hardware']}"
    return f"{models}; tree: {run['tree']}; {run['max_gen_len']} new tokens"


def pivot(rows: pd.DataFrame, figure: str) -> pd.DataFrame:
    """A figure by length (in order of prompt tokens) and method; a method that was not measured is all NaN."""
    order = rows.drop_duplicates("length").set_index("length").index
    table = rows.pivot(index="length", columns="method", values=figure).astype(float).reindex(order)
    return table.reindex(columns=[STANDARD, SPECEXTEND, *(set(table.columns) - {STANDARD, SPECEXTEND})])


# --- the report -----------------------------------------------------------------------------------------------------


def full_report(figures: pd.DataFrame, results: Path) -> str:
    parts = ["# Results", "Written by `scripts/make_tables.py` from the files named below; do not edit.", LEGEND]
    for run, measured in runs_of(figures):
        parts.append(f"## {title_of(run)}")
        for (data, temperature), rows in measured.groupby(["data", "temperature"], sort=False):
            parts += [f"### {data}, temperature {temperature:g}", side_by_side(rows)]
            if set(rows["method"]) - {STANDARD, SPECEXTEND}:
                parts += all_methods(rows)
            parts += tables_of(rows)
            sources = ", ".join(f"[{file}]({file})" for file in sorted(set(rows["file"])))
            versions = "; ".join(sorted(set(rows["versions"])))
            parts.append(f"{samples_of(rows)} samples per length, {versions}. Files: {sources}.")
    parts += [f"## On a GPU\n\n{section}" for section in gpu_reports(results, near_ties=True)]
    for path, content in read_records(results, "needle.json"):
        parts += [f"## Needles: {title_of_records(content)}", NEEDLES, needle_table(content), file_link(path, results)]
    for path, content in read_records(results, "analysis.json"):
        parts += [f"## Analyses: {title_of_records(content)}", *analysis_tables(content), file_link(path, results)]
    return "\n\n".join(parts) + "\n"


def file_link(path: Path, results: Path) -> str:
    name = path.relative_to(results).as_posix()
    return f"File: [{name}]({name})."


def samples_of(rows: pd.DataFrame) -> str:
    """`4`, or `2 to 6`."""
    return " to ".join(str(count) for count in dict.fromkeys((rows["samples"].min(), rows["samples"].max())))


def side_by_side(rows: pd.DataFrame) -> str:
    """Standard and SpecExtend, each length on the prompts that both have answered."""
    rows = on_shared(rows, (STANDARD, SPECEXTEND))
    if rows.empty:
        return "Neither standard nor SpecExtend was measured."
    prompt_tokens = rows.drop_duplicates("length").set_index("length")["prompt_tokens.mean"]
    baseline = pivot(rows, "autoregressive.decode_tokens_per_sec")[[STANDARD, SPECEXTEND]].mean(axis="columns")
    columns = {
        "prompt tokens": number(prompt_tokens, 0),
        **both("accepted", pivot(rows, "avg_accept_length")),
        **both("tokens/round", pivot(rows, "tokens_per_round"), ratio=False),
        "decode tok/s: AR": number(baseline, 1),
        **both("decode tok/s", pivot(rows, "decode_tokens_per_sec"), digits=1, ratio=False),
        **both("decode speed-up", pivot(rows, "speedup_decode")),
        **both("end-to-end speed-up", pivot(rows, "speedup")),
        "equal: standard": equal(rows, STANDARD),
        "equal: SpecExtend": equal(rows, SPECEXTEND),
    }
    return markdown(pd.DataFrame(columns))


def both(name: str, table: pd.DataFrame, *, digits: int = 2, ratio: bool = True) -> dict[str, pd.Series]:
    """Columns of a figure for standard and SpecExtend, and their ratio."""
    columns = {
        f"{name}: standard": number(table[STANDARD], digits),
        f"{name}: SpecExtend": number(table[SPECEXTEND], digits),
    }
    return columns | ({f"{name}: ratio": number(table[SPECEXTEND] / table[STANDARD])} if ratio else {})


def all_methods(rows: pd.DataFrame) -> Iterator[str]:
    """Every method by length, a table per figure; what stands in brackets is said above each."""
    yield "All methods, each over all prompts it has answered (how many: the last table)."
    yield "Draft tokens accepted per round:"
    yield by_length(rows, "avg_accept_length")
    yield "Decode speed-up over our autoregressive loop:"
    yield by_length(rows, "speedup_decode")
    yield "End-to-end speed-up over our autoregressive loop, ratio of totals (mean of the samples' ratios):"
    yield by_length(rows, "speedup", "speedup_mean_of_ratios")
    naive = rows[rows["method"] == NAIVE]
    if not naive.empty:
        yield (
            "Speed-up over Hugging Face's eager `generate`, end to end (decoding), each against our loop beside it, on "
            "the prompts that both have answered:"
        )
        over = {name: {method: lead(rows, method, NAIVE, name) for method in set(rows["method"])} for name in SPEEDUPS}
        at_naive = rows[rows["length"].isin(naive["length"])]
        places = list(zip(at_naive["method"], at_naive["length"], strict=True))
        leads = {name: [over[name][method].get(length) for method, length in places] for name in SPEEDUPS}
        yield by_length(at_naive.assign(**leads), "speedup", "speedup_decode")
    yield "Seconds to the first token:"
    yield by_length(rows, "ttft_s")
    if "token_s.p50" in rows:
        percentiles = rows.assign(**{name: 1e3 * rows[f"token_s.{name}"] for name in ("p50", "p90", "p99")})
        yield "Milliseconds per token while decoding, median (90th, 99th percentile):"
        yield by_length(percentiles, "p50", "p90", "p99", digits=1)
    if rows["peak_bytes"].notna().any():
        yield "Peak GPU memory, GB:"
        yield by_length(rows.assign(peak=rows["peak_bytes"].astype(float) / 1e9), "peak")
    yield "Samples whose tokens are those of autoregressive decoding, of all:"
    shares = rows["equal_to_autoregressive"].astype(str) + "/" + rows["samples"].astype(str)
    yield markdown(methods_by_lengths(rows.assign(equal=shares), "equal"))
    yield fastest(rows)


def by_length(rows: pd.DataFrame, figure: str, *more: str, digits: int = 2) -> str:
    """Methods by lengths; further figures in brackets."""
    cells = number(rows[figure], digits)
    if more:
        cells += " (" + pd.concat([number(rows[name], digits) for name in more], axis=1).agg(", ".join, axis=1) + ")"
    return markdown(methods_by_lengths(rows.assign(cell=cells), "cell"))


def methods_by_lengths(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    table = rows.pivot(index="method", columns="length", values=column)
    return table.reindex(index=dict.fromkeys(rows["method"]), columns=list(dict.fromkeys(rows["length"])))


def fastest(rows: pd.DataFrame) -> str:
    """Which method wins at each length, decoding and end to end: over each other on the prompts both have answered."""
    winners = {figure: fastest_by(rows.dropna(subset=list(SPEEDUPS)), figure) for figure in SPEEDUPS}
    said = [f"{length}: {', '.join(winners[figure][length] for figure in SPEEDUPS)}" for length in winners[SPEEDUPS[0]]]
    return f"Fastest while decoding, and end to end, at {'; '.join(said)}." if said else "No speeds to compare."


def fastest_by(rows: pd.DataFrame, figure: str) -> dict[str, str]:
    """By length the method whose smallest lead over another is largest."""
    winners = {}
    for length, group in rows.groupby("length", sort=False):
        names = list(group["method"])
        leads = pd.DataFrame(
            [[lead(group, one, other, figure).get(length) for other in names] for one in names], index=names
        ).astype(float)  # of a method over itself: 1, which changes no winner
        winners[length] = leads.min(axis="columns").idxmax()
    return winners


def number(values: pd.Series, digits: int = 2) -> pd.Series:
    """Formatted; empty where there is no figure."""
    return values.astype(float).map(lambda value: "" if pd.isna(value) else f"{value:,.{digits}f}".replace("inf", "∞"))


def equal(rows: pd.DataFrame, method: str) -> pd.Series:
    rows = rows[rows["method"] == method].set_index("length")
    return rows["equal_to_autoregressive"].astype(str) + "/" + rows["samples"].astype(str)


# --- the README's short form ----------------------------------------------------------------------------------------


def short_report(figures: pd.DataFrame) -> str:
    """Two tables, prompts by run, each cell standard and SpecExtend; then what the runs are."""
    compared = pd.concat(
        [
            on_shared(cell, (STANDARD, SPECEXTEND))
            for _, rows in runs_of(figures)
            if {STANDARD, SPECEXTEND} <= set(rows["method"])
            for _, cell in rows.groupby(["data", "temperature"], sort=False)
        ]
        or [figures[:0]]
    )
    runs = {
        f"- `{Path(run['folder']).name}`: {title_of(run)}, {samples_of(rows)} prompts per length"
        for run, rows in runs_of(compared)
    }
    parts = [
        "Draft tokens accepted per round, standard → SpecExtend:",
        arrows(compared, "avg_accept_length"),
        "Decode speed over autoregressive decoding, standard → SpecExtend:",
        arrows(compared, "speedup_decode"),
        "\n".join(sorted(runs)),
        f"{LEGEND} Every figure: [results/REPORT.md](results/REPORT.md).",
    ]
    return "\n\n".join(parts)


def arrows(rows: pd.DataFrame, figure: str) -> str:
    """A table of a figure: one line per data set and length, one column per run and temperature."""
    columns = {}
    for (folder, temperature), measured in rows.groupby(["folder", "temperature"], sort=True):
        lines = {}
        for data, group in measured.groupby("data", sort=True):
            table = pivot(group, figure)
            for length, standard, ours in zip(table.index, table[STANDARD], table[SPECEXTEND], strict=True):
                lines[f"{data}, {length}"] = f"{standard:.2f} → {ours:.2f}".replace("nan", "–")
        columns[f"{Path(folder).name}, temperature {temperature:g}"] = pd.Series(lines)
    order = list(dict.fromkeys(line for column in columns.values() for line in column.index))
    return markdown(pd.DataFrame(columns).reindex(order).rename_axis("prompts"))


def fill_readme(readme: Path, text: str) -> None:
    """Replace what stands between the markers; exit with one line where they are missing."""
    content = readme.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(END) < content.index(BEGIN):
        sys.exit(f"{readme} needs one {BEGIN} and one {END} after it; the results go between them")
    before, _, rest = content.partition(BEGIN)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
