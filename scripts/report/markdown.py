"""Tables as Markdown, from a list of columns: name, source, format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pandas as pd


class Column(NamedTuple):
    """A column of a table: its heading, the column of the rows it shows, and how many digits."""

    name: str
    source: str
    digits: int = 2


def table_of(rows: pd.DataFrame, columns: Iterable[Column]) -> str:
    """The rows' index and `columns` of them."""
    cells = {column.name: rows[column.source].map(lambda value, n=column.digits: cell(value, n)) for column in columns}
    return markdown(pd.DataFrame(cells, index=rows.index))


def lines_of(lines: Mapping[Any, Mapping[str, str]], name: str = "length") -> str:
    """A table from rows of finished cells by their first cell, whose heading is `name`."""
    return markdown(pd.DataFrame.from_dict(lines, orient="index").rename_axis(name))


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table with the named index as its first column; nothing where there is no value."""
    header = [table.index.name, *table.columns]
    rows = [[name, *cells] for name, cells in zip(table.index, table.fillna("").values, strict=True)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (header, ["---:"] * len(header), *rows))


def cell(value: Any, digits: int = 2) -> str:
    """A number with so many digits, a text as it is, nothing for no value."""
    if value is None or value != value:
        return ""
    return value if isinstance(value, str) else f"{value:,.{digits}f}".replace("inf", "∞")


def spread(mean: float, low: float | None, high: float | None) -> str:
    """A mean with its interval, as far as it has one."""
    return cell(mean) if low is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]"
