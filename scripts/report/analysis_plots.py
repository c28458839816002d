"""Figures of the needles and the analyses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scripts.report.analyses import CACHE_NAMES, entropy_shares, needle_shares, parts_of
from scripts.report.records import title_of_document
from scripts.report.style import BLUE, CACHES, RIVALS, STYLES, line_of, note, shared_legend


def needle_figure(content: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """A heat map per cache: accuracy on the needle's tokens by depth and length (table 1)."""
    shares = needle_shares(content["records"], ["length", "depth"])
    lengths, depths = list(shares["length"].unique()), sorted(shares["depth"].unique())
    kinds = list(CACHE_NAMES)[:-1]
    figure, panels = plt.subplots(1, len(kinds), figsize=(1 + 2.1 * len(kinds), 2.9), sharey=True, layout="constrained")
    for axes, kind in zip(panels, kinds, strict=True):
        cells = shares[shares["cache"] == kind].pivot(index="depth", columns="length", values="accuracy")
        values = cells.reindex(index=depths, columns=lengths).to_numpy()
        image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value < 0.55 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=color)
        axes.set_title(CACHE_NAMES[kind].replace(", ", ",\n"))
        axes.set_xticks(range(len(lengths)), lengths)
        axes.grid(visible=False)
    panels[0].set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    panels[0].set_ylabel("depth of the fact in the context")
    figure.supxlabel("context tokens", fontsize=9)
    figure.colorbar(image, ax=panels, label="accuracy on the answer", shrink=0.9)
    note(figure, title_of_document(content))
    yield "needle", figure


def analysis_figures(content: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Name and figure of each part that was measured."""
    draw = {
        "divergence": divergence_figure,
        "entropy": entropy_figure,
        "chunks": chunks_figure,
        "sweep": sweep_figure,
        "equation1": equation_figure,
    }
    parts = parts_of(content)
    for part, make in draw.items():
        if part in parts:
            figure = make(parts[part])
            note(figure, title_of_document(content))
            yield part, figure


def divergence_figure(rows: pd.DataFrame) -> Figure:
    """Divergence between draft and target by position (figure 3)."""
    figure, panels = plt.subplots(1, 2, figsize=(7.4, 3.1), layout="constrained")
    lengths = list(rows["length"].unique())
    for axes, name, label in zip(
        panels, ("kl", "same_argmax"), ("KL divergence from the target, nats", "share of equal argmax"), strict=True
    ):
        for kind, style in CACHES.items():
            means = rows.groupby("length", sort=False)[f"{kind}.{name}"].mean().reindex(lengths)
            axes.plot(range(len(lengths)), means, **line_of(style))
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set(ylabel=label, ylim=(0, None))
    figure.supxlabel("position in the text, tokens", fontsize=9)
    shared_legend(figure, [panels[0]])
    return figure


def entropy_figure(rows: pd.DataFrame) -> Figure:
    """Share of accepted drafts among output tokens, from those the target is sure of to the hardest tenth."""
    shares = entropy_shares(rows)
    figure, axes = plt.subplots(figsize=(5.2, 3.1), layout="constrained")
    for method, style in (STYLES | RIVALS).items():
        measured = shares[shares["method"] == method]
        if len(measured):
            axes.plot(measured["group"].astype(int), measured["accepted"], **line_of(style))
    axes.axvspan(9.5, 10.5, color="#EEEEEE", zorder=0)
    axes.set_xticks(range(1, 11))
    axes.set(
        xlabel="tenth of the output tokens by the target's entropy (10: hard)",
        ylabel="accepted drafts, share",
        ylim=(0, 1),
    )
    shared_legend(figure, [axes])
    return figure


def chunks_figure(rows: pd.DataFrame) -> Figure:
    """Which chunks each refresh chose; the line is the end of the context."""
    one = rows.iloc[0]
    last = max(max(chosen) for chosen in one["chosen"])
    picked = np.zeros((last + 1, len(one["chosen"])))
    for column, chosen in enumerate(one["chosen"]):
        picked[chosen, column] = 1
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    every = one["round"][1] - one["round"][0] if len(one["round"]) > 1 else 1
    edges = [*one["round"], one["round"][-1] + every]
    colours = plt.matplotlib.colors.ListedColormap(["white", BLUE])
    axes.pcolormesh(edges, np.arange(last + 2), picked, cmap=colours, rasterized=True)  # thousands of cells
    axes.step(
        edges, [c / one["chunk_size"] for c in (*one["context"], one["context"][-1])], where="post", color="black"
    )
    axes.grid(visible=False)
    axes.set(xlabel="round", ylabel=f"chunk of {one['chunk_size']} tokens (0: beginning)")
    often = picked.mean(axis=1)
    axes.set_title(
        f"{one['length']} prompt: {int(picked[:, 0].sum())} of {last + 1} chunks kept; "
        f"{(often == 1).sum()} at every refresh, {(often > 0).sum()} at least once"
    )
    return figure


def sweep_figure(rows: pd.DataFrame) -> Figure:
    """Accepted drafts and decoding speed by working cache, chunk size and refresh period (table 8)."""
    parameters = list(rows["parameter"].unique())
    names = {
        "working_cache_size": "working cache, tokens",
        "chunk_size": "chunk, tokens",
        "retrieve_every_n_steps": "rounds between refreshes",
    }
    figures = (("accepted_per_round", "accepted per round"), ("decode_tokens_per_s", "decode tokens/s"))
    figure, panels = plt.subplots(2, len(parameters), figsize=(8, 4.2), sharey="row", layout="constrained")
    for column, parameter in enumerate(parameters):
        means = rows[rows["parameter"] == parameter].groupby("value")[[name for name, _ in figures]].mean()
        for axes, (name, label) in zip(panels[:, column], figures, strict=True):
            axes.plot(range(len(means)), means[name], **line_of(STYLES["specextend"]))
            axes.set_xticks(range(len(means)), means.index, fontsize=7)
            if column == 0:
                axes.set_ylabel(label)
        panels[1, column].set_xlabel(names[parameter])
    for axes in panels[:, 0]:  # shared along the row; set last, once all are drawn
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    return figure


def equation_figure(rows: pd.DataFrame) -> Figure:
    """Speed-up predicted by equation 1 against the measured one, a point per prompt."""
    figure, axes = plt.subplots(figsize=(3.8, 3.6), layout="constrained")
    top = 1.1 * max(rows["predicted"].max(), rows["measured"].max())
    axes.plot([0, top], [0, top], color="black", linewidth=1, linestyle=":", label="equal")
    for method, style in STYLES.items():
        measured = rows[rows["method"] == method]
        look = {"color": style["color"], "marker": style["marker"], "s": 34, "label": style["label"]}
        axes.scatter(measured["predicted"], measured["measured"], edgecolors="white", linewidths=0.5, **look)
    axes.set(xlabel="predicted speed-up", ylabel="measured decoding speed-up", xlim=(0, top), ylim=(0, top))
    axes.set_aspect("equal")
    shared_legend(figure, [axes])
    return figure
