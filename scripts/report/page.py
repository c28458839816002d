"""The report as one HTML file: its Markdown, and every figure inside it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator
from pathlib import Path

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0;font-size:13px;display:block;overflow-x:auto}"
    "th,td{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:right;font-variant-numeric:tabular-nums}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}figure{margin:2em 0}"
)


def html_report(markdown: str, figures: Path) -> str:
    """A page of `markdown` (headings, tables, paragraphs) and the PNG files in `figures`."""
    images = "\n".join(_figure(path) for path in sorted(figures.glob("*.png")))
    body = "\n".join(_blocks(markdown))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>SpecExtend: results</title>\n'
        f"<style>{STYLE}</style>\n{body}\n<h2>Figures</h2>\n{images}\n</html>\n"
    )


def _blocks(markdown: str) -> Iterator[str]:
    for block in markdown.strip().split("\n\n"):
        heading = re.match(r"(#+) (.*)", block)
        if heading:
            level = len(heading[1])
            yield f"<h{level}>{_inline(heading[2])}</h{level}>"
        elif block.startswith("| "):
            yield _table(block.splitlines())
        else:
            yield f"<p>{_inline(block)}</p>"


def _table(lines: list[str]) -> str:
    rows = [[_inline(cell.strip()) for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    tags = ["th"] + ["td"] * (len(rows) - 1)
    return "<table>" + "".join(_row(cells, tag) for cells, tag in zip(rows, tags, strict=True)) + "</table>"


def _row(cells: list[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _inline(text: str) -> str:
    """Links, emphasis and code of a line; everything else escaped."""
    text = html.escape(text, quote=False)
    text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r'<a href="\2">\1</a>', text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"\*([^*]+)\*", r"<i>\1</i>", text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def _figure(path: Path) -> str:
    data, name = base64.b64encode(path.read_bytes()).decode(), html.escape(path.stem)
    image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{name}</figcaption></figure>"
