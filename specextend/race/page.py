"""The replay of a race: one self-contained HTML document, to be opened as a file or put into another page.

The document is `replay.html`; a race enters it as JSON and is shown through `textContent` alone, so that nothing a
model writes becomes markup.
"""

from __future__ import annotations

import html
import json
from pathlib import Path

from specextend.race.record import Race

TEMPLATE = Path(__file__).with_name("replay.html")
# of a script element's text, these alone could end it, or open a comment in it
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def replay_page(race: Race) -> str:
    """The whole document."""
    data = json.dumps(race.to_dict(), ensure_ascii=True, separators=(",", ":")).translate(_ESCAPES)
    return TEMPLATE.read_text(encoding="utf-8").replace("{{race}}", data)


def embedded(page: str) -> str:
    """`page` as an element of another page, which it can reach by messages alone."""
    return (
        '<iframe class="replay" title="Replay of the race" sandbox="allow-scripts" '
        f'srcdoc="{html.escape(page, quote=True)}"></iframe>'
    )
