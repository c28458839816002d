"""The report as one HTML file: its Markdown, and every figure inside it."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0;font-size:13px;display:block;overflow-x:auto}"
    "th,td{border-bottom:1px solid #ddd;padding:.25em .7em;font-variant-numeric:tabular-nums}"
    "th:first-child,td:first-child{text-align:left!important}img{max-width:100%}figure{margin:2em 0}"
)


def html_report(markdown: str, figures: Path) -> str:
    """A page of `markdown` and the PNG files in `figures`; HTML within the Markdown is shown, not obeyed."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    images = "\n".join(_figure(path) for path in sorted(figures.glob("*.png")))
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>SpecExtend: results</title>\n'
        f"<style>{STYLE}</style>\n{body}\n<h2>Figures</h2>\n{images}\n</html>\n"
    )


def _figure(path: Path) -> str:
    data, name = base64.b64encode(path.read_bytes()).decode(), html.escape(path.stem)
    image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{name}</figcaption></figure>"
