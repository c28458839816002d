"""Figures from the records under results/, as SVG and PNG into results/figures.

    python -m scripts.report.plots

Two figures per setting, one panel per data set and temperature: draft tokens accepted per round against the length, and
the decoding speed-up over autoregressive decoding in bars per length. Runs of many methods, needles and analyses have
figures of their own (`method_plots.py`, `analysis_plots.py`).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.report import story
from scripts.report.analysis_plots import analysis_figures, needle_figure
from scripts.report.method_plots import method_figures
from scripts.report.records import (
    PAIR,
    RUN,
    attempt,
    by,
    figures_of,
    read_documents,
    read_records,
    shared,
    title_of,
)
from scripts.report.style import LAYOUT, STYLES, line_of, note, save, shared_legend
from specextend.cli import flags


def main() -> None:
    args = parse_args()
    records = read_records(args.results)
    plt.rcParams.update(LAYOUT)
    folder = args.output or args.results / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figures = chain(
        story.figures(args.results), pair_figures(records), many_figures(records), document_figures(args.results)
    )
    print(json.dumps({"written": [path for name, figure in figures for path in save(figure, folder / name)]}))


def pair_figures(records: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Name and figure of standard and SpecExtend, by setting."""
    runs = [part for part in by(records[records["method"].isin(PAIR)], RUN) if part[1]["length"].nunique() > 1]
    for name, (run, rows) in zip(distinct([slug(run) for run, _ in runs]), runs, strict=True):
        title = title_of(run)
        yield f"accepted_{name}", panels(rows, draw_accepted, title=title, label="accepted draft tokens per round")
        if figures_of(rows)["speedup_decode"].notna().any():
            label = "decoding speed-up over autoregressive"
            yield f"speedup_{name}", panels(rows, draw_speedup, title=title, label=label)


def many_figures(records: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    for run, of_run in by(records, RUN):
        for first, rows in by(of_run, ["data", "temperature"]):
            title = f"{first['data']}, temperature {first['temperature']:g}; {title_of(run)}"
            place = f"{run['folder']}_{first['data']}_t{first['temperature']:g}".replace("/", "-").lstrip(".-")
            yield from ((f"{kind}_{place}", figure) for kind, figure in method_figures(rows, title))


def document_figures(results: Path) -> Iterator[tuple[str, Figure]]:
    for name, draw in (("needle.json", needle_figure), ("analysis.json", analysis_figures)):
        for path, content in read_documents(results, name):
            place = "".join(f"_{part}" for part in path.parent.relative_to(results).parts)
            for part, figure in attempt(path, lambda c=content, d=draw: list(d(c))) or []:
                yield f"{part}{place}", figure


def parse_args() -> argparse.Namespace:
    parser = flags.parser(__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records")
    parser.add_argument("--output", type=Path, help="folder for the figures; without it <results>/figures")
    return parser.parse_args()


def panels(rows: pd.DataFrame, draw: Callable[[Axes, pd.DataFrame], None], *, title: str, label: str) -> Figure:
    """One panel per data set (across) and temperature (down), all on one scale.

    Args:
        rows: records of one setting.
        draw: fills a panel from the rows of its data set and temperature.
        label: of the vertical axis.
    """
    data, temperatures = rows["data"].unique(), sorted(rows["temperature"].unique())
    size = (1.2 + 3.2 * len(data), 1.2 + 2.3 * len(temperatures))
    figure, grid = plt.subplots(
        len(temperatures), len(data), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes_row, temperature in zip(grid, temperatures, strict=True):
        for axes, name in zip(axes_row, data, strict=True):
            axes.set_title(f"{name}, temperature {temperature:g}")
            panel = rows[(rows["data"] == name) & (rows["temperature"] == temperature)]
            if panel.empty:
                axes.set_axis_off()
                continue
            draw(axes, figures_of(shared(panel)))
    grid[0, 0].margins(y=0.1)
    grid[0, 0].set_ylim(bottom=0)  # shared; set last, once all panels are scaled
    figure.supylabel(label, fontsize=9)
    figure.supxlabel("prompt tokens (nominal)", fontsize=9)
    shared_legend(figure, list(grid.flat))
    note(figure, f"{title}\nbands and whiskers: 10th to 90th percentile of the samples, at each length those of both")
    return figure


def draw_accepted(axes: Axes, rows: pd.DataFrame) -> None:
    """Lines with a band from the 10th to the 90th percentile of the samples."""
    lengths = list(rows["length"].unique())
    for method, style in STYLES.items():
        measured = rows[rows["method"] == method]
        x = [lengths.index(length) for length in measured["length"]]
        low, high = (measured[f"spread.avg_accept_length.{edge}"].astype(float) for edge in ("p10", "p90"))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(x, measured["avg_accept_length"].astype(float), **line_of(style))
    axes.set_xticks(range(len(lengths)), lengths)


def draw_speedup(axes: Axes, rows: pd.DataFrame) -> None:
    """Bars with the value on top, whiskers from the 10th to the 90th percentile, autoregressive decoding as a line."""
    lengths = list(rows["length"].unique())
    width = 0.4
    for offset, (method, style) in zip((-width / 2, width / 2), STYLES.items(), strict=True):
        measured = rows[rows["method"] == method]
        x = np.array([lengths.index(length) for length in measured["length"]]) + offset
        height = measured["speedup_decode"].astype(float).to_numpy()
        look = {"facecolor": style["color"], "hatch": style["hatch"], "edgecolor": "white", "label": style["label"]}
        axes.bar(x, height, width, **look)
        low, high = (measured[f"spread.speedup_decode.{edge}"].astype(float).to_numpy() for edge in ("p10", "p90"))
        axes.vlines(x, low, high, color="#333333", linewidth=1)
        for position, value, top in zip(x, height, np.fmax(height, high), strict=True):
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
            text = {"ha": "center", "va": "bottom", "fontsize": 7, "bbox": box}
            axes.annotate(f"{value:.1f}", (position, top), (0, 2.5), textcoords="offset points", **text)
    axes.axhline(1, color="black", linewidth=1, linestyle=":", label="autoregressive = 1")
    axes.set_xticks(range(len(lengths)), lengths)


def slug(run: pd.Series) -> str:
    """Short name of a setting: `cpu_bundled_float32_50x10`."""
    nodes, depth = re.findall(r"\d+", run["tree"])[:2]
    parts = [run["folder"], run["model"], run["dtype"], f"{nodes}x{depth}"]
    return re.sub(r"[^A-Za-z0-9_]+", "-", "_".join(parts)).strip("-_")


def distinct(names: list[str]) -> list[str]:
    """Names with a number behind those that occurred before."""
    return [f"{name}-{seen + 1}" if (seen := names[:index].count(name)) else name for index, name in enumerate(names)]


if __name__ == "__main__":
    flags.run(main)
