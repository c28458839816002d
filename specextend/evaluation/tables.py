"""The figures of an evaluation as tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import RenderableType

from specextend.evaluation.panel_figures import pooled
from specextend.evaluation.terminal import Column, fitted_table

Figures = dict[str, Any]


def results_table(report: Figures, width: int) -> RenderableType:
    """The per-length figures as a table of at most `width` characters."""
    setting = report["manifest"]["setting"]
    method = setting["method"]
    rows = lengths_of(report)

    def column(heading: str, cell: Callable[[Figures], str], rank: int = 0) -> Column:
        return Column(heading, [cell(figures) for _, figures in rows], rank)

    columns = [
        Column("length", [length for length, _ in rows]),
        column("prompt tokens", lambda f: f"{f['prompt_tokens']['mean']:,.0f}", 4),
        column("accepted", lambda f: format_figure(f["avg_accept_length"])),
        column("tokens per round", lambda f: format_figure(f["tokens_per_round"]), 5),
        column("tok/s AR", lambda f: format_figure(f["autoregressive"]["tokens_per_sec"], 1), 2),
        column("tok/s", lambda f: format_figure(f["avg_tokens_per_sec"], 1), 3),
        column("speedup", lambda f: format_figure(f["speedup"])),
        column("speedup decode", lambda f: format_figure(f["speedup_decode"])),
        column("equal", lambda f: f"{f['equal_to_autoregressive']}/{f['samples']}"),
    ]
    return fitted_table(
        columns,
        width,
        title=f"{setting['data']}, {setting['model']} ({setting['dtype']}, {setting['device']}, "
        f"{setting.get('backend', 'eager')}), {method}, temperature {setting['sampling']['temperature']:g}",
        caption="accepted: drafts per round, bonus excluded; tok/s and speedup end to end; equal: samples",
    )


def panel_table(report: Figures, width: int) -> RenderableType:
    """The figures of several arms, data sets together."""
    setting = report["manifest"]["setting"]
    rows = pooled(report["figures"])

    def column(heading: str, cell: Callable[[Figures], str], rank: int = 0, left: bool = False) -> Column:
        return Column(heading, [cell(row) for row in rows], rank, left)

    columns = [
        column("temp.", lambda row: f"{row['temperature']:g}"),
        column("length", lambda row: row["length"]),
        column("arm", lambda row: row["arm"], left=True),
        column("prompts", lambda row: str(row["prompts"]), 4),
        column("accepted", lambda row: format_figure(row["accepted"]["mean"])),
        column("tok/s AR", lambda row: format_figure(row["ar_decode_tokens_per_s"], 1), 3),
        column("tok/s", lambda row: format_figure(row["decode_tokens_per_s"], 1), 2),
        column("speedup decode", lambda row: _with_interval(row["speedup_decode"])),
        column("speedup", lambda row: _with_interval(row["speedup"]), 1),
        column("equal", lambda row: f"{row['equal']}/{row['prompts']}"),
    ]
    return fitted_table(
        columns,
        width,
        title=f"{setting['model']} ({setting['dtype']}, {setting['device']}, {setting['backend']})",
        caption="means over prompts of each prompt's own figure, in brackets their 95 % bootstrap intervals; accepted: "
        "drafts per round, bonus excluded; tok/s: decoding, ratio of totals; equal: prompts",
    )


def _with_interval(figure: Figures) -> str:
    mean, low, high = (format_figure(figure[name]) for name in ("mean", "low", "high"))
    return mean if figure["low"] is None else f"{mean} [{low}, {high}]"


def output_table(report: Figures, width: int) -> RenderableType:
    """The figures by position in the output, for long answers."""
    rows = [
        (length, stretch, figures)
        for length, by_length in lengths_of(report)
        for stretch, figures in by_length["by_output_position"].items()
    ]

    def column(heading: str, name: str, digits: int = 2, rank: int = 0) -> Column:
        return Column(heading, [format_figure(figures[name], digits) for *_, figures in rows], rank)

    columns = [
        Column("length", [length for length, *_ in rows]),
        Column("output tokens", [stretch for _, stretch, _ in rows]),
        column("accepted", "avg_accept_length"),
        column("tokens per round", "tokens_per_round", rank=3),
        column("decode tok/s AR", "autoregressive_decode_tokens_per_sec", 1, rank=1),
        column("decode tok/s", "decode_tokens_per_sec", 1, rank=2),
        column("speedup decode", "speedup_decode"),
        Column("runs", [str(figures["runs"]) for *_, figures in rows]),
    ]
    return fitted_table(columns, width, title="by position in the output: the context grows while it is written")


def lengths_of(report: Figures) -> list[tuple[str, Figures]]:
    """The figures by length, without the manifest."""
    return [(name, figures) for name, figures in report.items() if name != "manifest"]


def format_figure(value: float | None, digits: int = 2) -> str:
    """A dash where there is no figure."""
    return "-" if value is None else f"{value:.{digits}f}"
