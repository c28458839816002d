"""Figures of one run with many methods: acceptance, speed, where the time goes, the ablation, long outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.report.records import SPECEXTEND, STANDARD, figures_of, shared
from scripts.report.style import BLUE, GREY, ORANGE, RIVALS, STAGES, STYLES, line_of, note, shared_legend
from specextend.methods import METHODS

ABLATION = {
    "standard": "standard",
    "fa": "+ FA",
    "hta": "+ HTA",
    "streaming": "+ Stream-\ningLLM",
    "cmr": "+ CMR",
    "specextend": "SpecExtend",
}
OWN = "each method over all prompts it has answered, which need not be the same"


def method_figures(records: pd.DataFrame, title: str) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each kind that the records of one setting, data set and temperature allow."""
    rows = figures_of(records)
    methods = set(rows["method"])
    if methods & set(RIVALS):
        yield "acceptance", acceptance(rows, title)
    timed = rows.dropna(subset="speedup_decode")
    if len(set(timed["method"])) > 2:
        yield "bars", speedups(timed, title)
    if "stages_s.verify" in rows and rows["stages_s.verify"].notna().any():
        yield "stages", stages(rows.dropna(subset="stages_s.verify"), title)
    if set(ABLATION) <= methods and rows["speedup"].notna().any():
        yield "ablation", ablation(figures_of(shared(records, tuple(ABLATION))), title)
    if (rows["max_gen_len"] > 1024).any():
        yield "output", by_output(rows, title)


def acceptance(rows: pd.DataFrame, title: str) -> Figure:
    """Accepted drafts per round against the prompt's length (figure 4a)."""
    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    lengths = list(rows["length"].unique())
    for method, style in (STYLES | RIVALS).items():
        measured = rows[rows["method"] == method]
        if len(measured):
            x = [lengths.index(length) for length in measured["length"]]
            axes.plot(x, measured["avg_accept_length"].astype(float), **line_of(style))
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set(xlabel="prompt tokens (nominal)", ylabel="accepted draft tokens per round", ylim=(0, None))
    shared_legend(figure, [axes])
    note(figure, f"{title}\n{OWN}")
    return figure


def bars(
    rows: pd.DataFrame, draw: Callable[[Axes, pd.DataFrame, np.ndarray], None], across: Sequence[float],
    down: Sequence[float],
) -> Figure:  # fmt: skip
    """A panel per length with bars by method.

    Args:
        draw: fills a panel from its rows, indexed by method, at the heights it is given.
        across, down: inches of the figure: what stands around the panels, and what a panel or a bar adds.
    """
    lengths = list(rows["length"].unique())
    present = [method for method in METHODS if method in set(rows["method"])]
    size = (across[0] + across[1] * len(lengths), down[0] + down[1] * len(present))
    figure, panels = plt.subplots(1, len(lengths), figsize=size, sharey=True, squeeze=False, layout="constrained")
    y = np.arange(len(present))[::-1]
    for axes, length in zip(panels[0], lengths, strict=True):
        draw(axes, rows[rows["length"] == length].set_index("method").reindex(present), y)
        axes.set_title(length)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    panels[0, 0].set_yticks(y, [METHODS[method].label for method in present])
    shared_legend(figure, [panels[0, 0]])
    return figure


def speedups(rows: pd.DataFrame, title: str) -> Figure:
    """Decoding, and end to end (a thin bar in grey)."""

    def draw(axes: Axes, panel: pd.DataFrame, y: np.ndarray) -> None:
        decode, whole = (panel[name].astype(float) for name in ("speedup_decode", "speedup"))
        colors = [BLUE if method == SPECEXTEND else ORANGE for method in panel.index]
        axes.barh(y + 0.16, decode, 0.46, color=colors, label="decoding (SpecExtend in blue)")
        axes.barh(y - 0.24, whole, 0.26, color=GREY, label="end to end")
        for position, value in zip(y, decode, strict=True):
            if value == value:
                where = {"xytext": (2, 0), "textcoords": "offset points", "va": "center", "fontsize": 6.5}
                axes.annotate(f"{value:.2f}", (value, position + 0.16), **where)
        axes.axvline(1, color="black", linewidth=1, linestyle=":", label="our autoregressive loop = 1")
        axes.set_xlim(0, max(1.1, 1.22 * np.nanmax([*decode, *whole])))

    figure = bars(rows, draw, across=(2.6, 1.6), down=(1.2, 0.32))
    figure.supxlabel("speed-up over our autoregressive loop, by prompt tokens (nominal)", fontsize=9)
    note(figure, f"{title}\n{OWN}")
    return figure


def stages(rows: pd.DataFrame, title: str) -> Figure:
    """Seconds of a generation by stage (figure 4b), each panel on its own scale."""

    def draw(axes: Axes, panel: pd.DataFrame, y: np.ndarray) -> None:
        left = np.zeros(len(y))
        for stage, (color, hatch) in STAGES.items():
            if f"stages_s.{stage}" in panel:
                width = panel[f"stages_s.{stage}"].astype(float).fillna(0).to_numpy()
                look = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3, "label": stage}
                axes.barh(y, width, 0.7, left=left, **look)
                left = left + width

    figure = bars(rows, draw, across=(3.0, 1.8), down=(1.4, 0.27))
    tokens = rows["max_gen_len"].iloc[0]
    figure.supxlabel(f"seconds per generation of up to {tokens} tokens, by prompt tokens", fontsize=9)
    note(figure, title)
    return figure


def ablation(rows: pd.DataFrame, title: str) -> Figure:
    """Each part alone on top of standard, and all (table 4): acceptance and end-to-end speed over standard."""
    lengths = list(rows["length"].unique())
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    base = rows[rows["method"] == STANDARD].set_index("length")["speedup"].astype(float)
    shades = plt.get_cmap("cividis_r")(np.linspace(0.1, 0.95, len(lengths)))
    width = 0.8 / len(lengths)
    for index, length in enumerate(lengths):
        panel = rows[rows["length"] == length].set_index("method").reindex(list(ABLATION))
        x = np.arange(len(ABLATION)) + (index - (len(lengths) - 1) / 2) * width
        accepted, speed = panel["avg_accept_length"].astype(float), panel["speedup"].astype(float)
        look = {"color": shades[index], "edgecolor": "#555555", "linewidth": 0.4, "label": length}
        panels[0].bar(x, accepted, width, **look)
        panels[1].bar(x, speed / base.get(length, float("nan")), width, **look)
    for axes, label in zip(panels, ("accepted draft tokens per round", "end-to-end speed over standard"), strict=True):
        axes.set_xticks(range(len(ABLATION)), ABLATION.values(), fontsize=7)
        axes.set_ylabel(label)
    panels[1].axhline(1, color="black", linewidth=1, linestyle=":")
    shared_legend(figure, [panels[0]])
    note(figure, title)
    return figure


def by_output(rows: pd.DataFrame, title: str) -> Figure:
    """Accepted drafts per round by position in a long output (figure 6)."""
    names = [
        name for name in rows.columns if name.startswith("by_output_position.") and name.endswith("avg_accept_length")
    ]
    positions = [name.split(".")[1] for name in names]
    order = np.argsort([int(position.split("-")[1].rstrip("K")) for position in positions])
    figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    for method, style in (STYLES | RIVALS).items():
        measured = rows[rows["method"] == method]
        if len(measured):
            values = measured[[names[i] for i in order]].astype(float).mean()
            axes.plot(range(len(order)), values, **line_of(style))
    axes.set_xticks(range(len(order)), [positions[i] for i in order])
    axes.set(xlabel="position in the output, tokens", ylabel="accepted draft tokens per round", ylim=(0, None))
    shared_legend(figure, [axes])
    note(figure, title)
    return figure
