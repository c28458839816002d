"""Figures of arms beside each other: acceptance and decoding speed-up against the prompt's length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.report.records import models_and_place
from scripts.report.style import note, shared_legend, styles_of
from specextend.evaluation.panel import Panel
from specextend.evaluation.panel_figures import figures_of, pooled

Row = dict[str, Any]
PANELS = (("accepted", "accepted draft tokens per round"), ("speedup_decode", "decoding speed-up over autoregressive"))
SPREAD = 0.2  # of the arms around their length, so that their bars do not cover each other


def evidence_figures(manifest: dict[str, Any], panels: Sequence[Panel]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each temperature, the highest first."""
    setting = manifest["setting"]
    data = ", ".join(dict.fromkeys(panel.data for panel in panels))
    methods = {name: arm["method"] for name, arm in setting["arms"].items()}
    rows = pooled(figures_of(panels))
    for temperature in dict.fromkeys(row["temperature"] for row in rows):
        here = [row for row in rows if row["temperature"] == temperature]
        title = f"{models_and_place(setting, manifest['environment'])}; {data}; temperature {temperature:g}"
        yield f"arms_t{temperature:g}", by_length(here, methods, title)


def by_length(rows: Sequence[Row], methods: dict[str, str], title: str) -> Figure:
    """Means over prompts with their 95 % intervals, a line per arm.

    Args:
        rows: figures of one temperature.
        methods: of each arm.
    """
    figure, grid = plt.subplots(1, len(PANELS), figsize=(8.4, 3.6), layout="constrained")
    for axes, (measure, label) in zip(grid, PANELS, strict=True):
        _draw(axes, rows, methods, measure)
        axes.set(xlabel="prompt tokens (nominal)", ylabel=label)
    grid[1].axhline(1, color="black", linewidth=1, linestyle=":")
    for axes in grid:
        axes.set_ylim(bottom=0)
    shared_legend(figure, [*grid])
    counts = sorted({row["prompts"] for row in rows})
    prompts = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    note(
        figure,
        f"{title}\nmeans of {prompts} prompts per length, bars: 95 % bootstrap intervals; dotted: autoregressive",
    )
    return figure


def _draw(axes: Axes, rows: Sequence[Row], methods: dict[str, str], measure: str) -> None:
    lengths = [*dict.fromkeys(row["length"] for row in rows)]
    styles = styles_of(methods)
    shifts = np.linspace(-SPREAD, SPREAD, len(methods)) / 2 if len(methods) > 1 else [0.0]
    for (arm, method), shift in zip(methods.items(), shifts, strict=True):
        if measure == "accepted" and method.startswith("autoregressive"):
            continue
        measured = [row for row in rows if row["arm"] == arm and row[measure]["mean"] is not None]
        if not measured:
            continue
        figures = [row[measure] for row in measured]
        mean = np.array([one["mean"] for one in figures])
        low, high = (
            np.array([one["mean"] if one[edge] is None else one[edge] for one in figures]) for edge in ("low", "high")
        )
        x = np.array([lengths.index(row["length"]) for row in measured]) + shift
        style = styles[arm]
        axes.errorbar(x, mean, yerr=np.stack([mean - low, high - mean]), elinewidth=1, capsize=2, **style)
    axes.set_xticks(range(len(lengths)), lengths)
