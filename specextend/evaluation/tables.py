"""The figures of an evaluation as tables for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table


def results_table(report: dict[str, Any]) -> Table:
    """The per-length figures as a table for the terminal."""
    setting = report["manifest"]["setting"]
    method = setting["method"]
    table = Table(
        title=f"{setting['data']}, {setting['model']} ({setting['dtype']}, {setting['device']}), {method}, "
        f"temperature {setting['sampling']['temperature']:g}",
        caption="accepted: drafts per round, bonus excluded; tok/s and speedup end to end; equal: samples",
    )
    headings = ("accepted", "tokens/round", "tok/s AR", f"tok/s {method}", "speedup", "speedup decode", "equal")
    for heading in ("length", "prompt tokens", *headings):
        table.add_column(heading, justify="right")
    for length, figures in _lengths(report):
        table.add_row(
            length,
            f"{figures['prompt_tokens']['mean']:,.0f}",
            format_figure(figures["avg_accept_length"]),
            format_figure(figures["tokens_per_round"]),
            format_figure(figures["autoregressive"]["tokens_per_sec"], 1),
            format_figure(figures["avg_tokens_per_sec"], 1),
            format_figure(figures["speedup"]),
            format_figure(figures["speedup_decode"]),
            f"{figures['equal_to_autoregressive']}/{figures['samples']}",
        )
    return table


def output_table(report: dict[str, Any]) -> Table:
    """The figures by position in the output, for long answers."""
    table = Table(title="by position in the output: the context grows while it is written")
    headings = ("accepted", "tokens/round", "decode tok/s AR", "decode tok/s", "speedup decode", "runs")
    for heading in ("length", "output tokens", *headings):
        table.add_column(heading, justify="right")
    for length, by_length in _lengths(report):
        for stretch, figures in by_length["by_output_position"].items():
            table.add_row(
                length,
                stretch,
                format_figure(figures["avg_accept_length"]),
                format_figure(figures["tokens_per_round"]),
                format_figure(figures["autoregressive_decode_tokens_per_sec"], 1),
                format_figure(figures["decode_tokens_per_sec"], 1),
                format_figure(figures["speedup_decode"]),
                str(figures["runs"]),
            )
    return table


def _lengths(report: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return [(name, figures) for name, figures in report.items() if name != "manifest"]


def format_figure(value: float | None, digits: int = 2) -> str:
    """A dash where there is no figure."""
    return "-" if value is None else f"{value:.{digits}f}"


def stdout_console() -> Console:
    """Rich output; 120 columns where stdout is no terminal, so that the table does not break."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)
