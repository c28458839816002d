"""Tables for the terminal: whole numbers at any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from specextend.evaluation.tables import output_table, results_table
from specextend.evaluation.terminal import Column, fitted_table


def drawn(table, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()


def report() -> dict:
    figures = {
        "prompt_tokens": {"mean": 16012.0}, "avg_accept_length": 3.456, "tokens_per_round": 4.456,
        "autoregressive": {"tokens_per_sec": 123.44}, "avg_tokens_per_sec": 345.66, "speedup": 2.812,
        "speedup_decode": 3.123, "equal_to_autoregressive": 20, "samples": 20,
        "by_output_position": {"31K-32K": {
            "avg_accept_length": 3.456, "tokens_per_round": 4.456, "autoregressive_decode_tokens_per_sec": 123.44,
            "decode_tokens_per_sec": 345.66, "speedup_decode": 3.123, "runs": 40,
        }},
    }  # fmt: skip
    setting = {
        "method": "fa_hta_streaming", "data": "govreport", "model": "bundled", "dtype": "float16", "device": "cuda",
        "backend": "graphs", "sampling": {"temperature": 0.8},
    }  # fmt: skip
    return {"16K": figures, "32K": figures, "manifest": {"setting": setting}}


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_figure_is_cut_at_any_width(width):
    for table, figures in (
        (results_table(report(), width), ("16K", "32K", "3.46", "2.81", "3.12", "20/20")),
        (output_table(report(), width), ("16K", "31K-32K", "3.46", "3.12", "40")),
    ):
        lines = drawn(table, width)
        text = "\n".join(lines)
        assert max(map(len, lines)) <= width and "…" not in text
        assert all(figure in text.split() for figure in figures)


def test_columns_are_left_out_by_rank_and_named_and_the_rest_is_stacked():
    columns = [Column("name", ["a", "b"]), Column("first", ["1.0", "2.0"], 1), Column("second", ["3.0", "4.0"], 2)]
    assert drawn(fitted_table(columns, 30), 30)[0].split() == ["name", "first", "second"]
    narrow = drawn(fitted_table(columns, 18), 18)
    assert narrow[0].split() == ["name", "first"] and " ".join(narrow[-2:]).split() == ["no", "room", "for:", "second"]
    wide_names = [Column("name", ["x" * 20]), Column("figure", ["1.23"])]
    assert drawn(fitted_table(wide_names, 28), 28)[-1].split() == ["x" * 20, "1.23"]
    stacked = drawn(fitted_table(wide_names, 24), 30)
    assert [line.split() for line in stacked if line.strip()] == [["name", "x" * 20], ["figure", "1.23"]]
