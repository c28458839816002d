"""Output for people: a console that survives pipes, and tables that fit into any width."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 120  # where the output is no terminal and COLUMNS is not set
GAP = 2  # between columns; the box draws one of them


class PlainConsole(Console):
    """Numbers and paths uncoloured, no emoji codes; a closed pipe is the entry point's business."""

    def __init__(self, *, stderr: bool = False, **options: Any):
        stream = sys.stderr if stderr else sys.stdout
        piped = not stream.isatty()
        width = PIPED_WIDTH if piped and "COLUMNS" not in os.environ else None
        super().__init__(**{"width": width, "highlight": False, "emoji": False, "stderr": stderr} | options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@dataclass(frozen=True)
class Column:
    """A heading over cells; where there is no room, the columns of the highest `rank` are left out first."""

    heading: str
    cells: Sequence[str]
    rank: int = 0
    left: bool = False

    @property
    def width(self) -> int:
        """Least width that cuts neither a cell nor a word of the heading."""
        return max(map(len, [*self.cells, *self.heading.split()]), default=0)


def fitted_table(columns: Sequence[Column], width: int, *, title: str = "", caption: str = "") -> RenderableType:
    """The columns side by side; less important ones left out, and named, where `width` does not hold them.

    Where it does not hold even those of rank 0, each row becomes a block of lines.
    """
    shown = list(columns)
    while _width_of(shown) > width and any(column.rank for column in shown):
        shown.remove(max(reversed(shown), key=lambda column: column.rank))
    if _width_of(shown) > width:
        return _stacked(columns, title, caption)
    left_out = [column.heading for column in columns if column not in shown]
    table = Table(box=SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    room = width - _width_of(shown)
    for column in shown:
        more = max(0, len(column.heading) - column.width)  # for the whole heading on one line
        more *= more <= room
        room -= more
        table.add_column(Text(column.heading), justify="left" if column.left else "right", width=column.width + more)
    for row in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*(Text(cell) for cell in row))
    notes = [caption] if caption else []
    if left_out:
        notes.append(f"no room for: {', '.join(left_out)}")
    head = [Text(title, style="bold")] if title else []
    return Group(*head, table, *(Text(note, style="dim") for note in notes))


def _width_of(columns: Sequence[Column]) -> int:
    return sum(column.width + GAP for column in columns) - GAP


def _stacked(columns: Sequence[Column], title: str, caption: str) -> RenderableType:
    """A block per row, a line per column."""
    name = max(len(column.heading) for column in columns)
    lines = [title] if title else []
    for row in zip(*(column.cells for column in columns), strict=True):
        lines += ["", *(f"{column.heading:{name}}  {cell}" for column, cell in zip(columns, row, strict=True))]
    return Text("\n".join([*lines, "", caption] if caption else lines))
