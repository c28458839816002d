"""How every figure looks: colours that colour-blind readers tell apart, grey print by marker and hatch, fixed files."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, by what they stand for; lightness differs too.
ORANGE, BLUE, GREEN, PURPLE = "#E69F00", "#0072B2", "#009E73", "#CC79A7"
VERMILION, SKY, GREY, BLACK = "#D55E00", "#56B4E9", "#999999", "#000000"

STYLES = {
    "standard": {"color": ORANGE, "marker": "s", "linestyle": "--", "hatch": "///", "label": "standard"},
    "specextend": {"color": BLUE, "marker": "o", "linestyle": "-", "hatch": "", "label": "SpecExtend"},
}
RIVALS = {
    "fa_hta_streaming": {"color": GREEN, "marker": "^", "linestyle": "-.", "label": "StreamingLLM draft cache"},
    "prompt_lookup": {"color": PURPLE, "marker": "D", "linestyle": ":", "label": "prompt lookup"},
    "magicdec": {"color": VERMILION, "marker": "v", "linestyle": "--", "label": "MagicDec"},
    "self_retrieval": {"color": SKY, "marker": "X", "linestyle": "-.", "label": "self-retrieval"},
    "triforce": {"color": BLACK, "marker": "P", "linestyle": ":", "label": "TriForce"},
}
PARTS = {
    "autoregressive": {"color": GREY, "marker": "_", "linestyle": "-", "label": "autoregressive"},
    "autoregressive_hf": {"color": GREY, "marker": "x", "linestyle": ":", "label": "autoregressive, Hugging Face"},
    "fa": {"color": "#F0C869", "marker": "<", "linestyle": "--", "label": "+ FlashAttention"},
    "hta": {"color": "#A6761D", "marker": ">", "linestyle": "--", "label": "+ Hybrid Tree Attention"},
    "streaming": {"color": "#66C2A5", "marker": "h", "linestyle": ":", "label": "+ StreamingLLM"},
    "cmr": {"color": "#7FA8D1", "marker": "H", "linestyle": ":", "label": "+ Cross-model Retrieval"},
    "fa_hta": {"color": "#8C510A", "marker": "p", "linestyle": "--", "label": "+ FA + HTA, full draft cache"},
}
VARIANTS = [("--", "s"), ("-.", "^"), (":", "D"), ("--", "v")]  # of further arms of one method: line and hollow mark
CACHES = {
    "full": STYLES["standard"] | {"label": "draft, full cache"},
    "streaming": RIVALS["fa_hta_streaming"] | {"label": "draft, StreamingLLM"},
    "cmr": STYLES["specextend"] | {"label": "draft, Cross-model Retrieval"},
    "target_retrieval": RIVALS["self_retrieval"] | {"label": "target, retrieved chunks"},
}
STAGES = {
    "prefill target": (BLUE, ""),
    "prefill draft": (SKY, "///"),
    "draft": (ORANGE, ""),
    "verify": (GREEN, "---"),
    "retrieve": (PURPLE, ""),
    "accept": (BLACK, ""),
}
LAYOUT = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "specextend",  # the same figures give the same file
}


def styles_of(arms: dict[str, str]) -> dict[str, dict[str, object]]:
    """A line's look for each arm, given with its method: the colour is the method's, in every figure.

    Of several arms of one method the first has the method's own line and mark, the others hollow marks.
    """
    styles: dict[str, dict[str, object]] = {}
    seen: dict[str, int] = {}
    for arm, method in arms.items():
        own = (STYLES | RIVALS | PARTS).get(method, {"color": BLACK, "marker": "o", "linestyle": "-", "label": method})
        place = seen[method] = seen.get(method, -1) + 1
        style = line_of(own)
        settings = arm.partition(":")[2]
        style["label"] = f"{own['label']} ({settings})" if settings else own["label"]
        if place:
            line, mark = VARIANTS[(place - 1) % len(VARIANTS)]
            style |= {"markerfacecolor": "white", "linestyle": line, "marker": mark}
        styles[arm] = style
    return styles


def line_of(style: dict[str, str]) -> dict[str, object]:
    """The part of a style that a line takes."""
    names = ("color", "marker", "linestyle", "label")
    return {name: style[name] for name in names} | {"markersize": 5, "linewidth": 1.8}


def shared_legend(figure: Figure, axes: list[Axes]) -> None:
    """One legend above all panels, an entry per label."""
    found = [pair for one in axes for pair in zip(*one.get_legend_handles_labels(), strict=True)]
    entries = {label: handle for handle, label in found}
    columns = min(len(entries), max(2, int(figure.get_size_inches()[0] / 1.7)))
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=columns, frameon=False)


def note(figure: Figure, text: str) -> None:
    """What was measured, small, below the figure and no wider than it."""
    width = int(21 * figure.get_size_inches()[0])
    text = "\n".join(textwrap.fill(line, width) for line in text.splitlines())
    figure.text(0.5, -0.01, text, ha="center", va="top", fontsize=7, color="#555555")


def save(figure: Figure, path: Path) -> list[str]:
    """SVG and PNG without a date, so that unchanged results give unchanged files."""
    targets = [Path(f"{path}.svg"), Path(f"{path}.png")]
    figure.savefig(targets[0], bbox_inches="tight", metadata={"Date": None})
    figure.savefig(targets[1], bbox_inches="tight", dpi=200)
    plt.close(figure)
    return [str(target) for target in targets]
