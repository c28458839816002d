"""The recipes of `docs/recipes.md` run as they stand, with fewer tokens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = re.findall(r"^## (.+?)$|^```python\n(.*?)^```$", (ROOT / "docs/recipes.md").read_text(), re.M | re.S)


def blocks() -> list[tuple[str, str]]:
    """(heading, code) of every Python block."""
    found, heading = [], ""
    for title, code in RECIPES:
        heading = title or heading
        if code:
            found.append((heading, code))
    return found


def test_there_are_six_recipes():
    assert [title for title, _ in RECIPES if title] == [
        "Summarize a long file", "Stream", "Several questions about one document", "Bring your own pair", "EAGLE-3",
        "Compare with autoregressive decoding",
    ]  # fmt: skip


@pytest.mark.parametrize("heading, code", blocks(), ids=[heading for heading, _ in blocks()])
def test_recipe_runs(heading, code, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shorter = re.sub(r'(max_new_tokens"?[=:] ?)\d+', r"\g<1>12", code)
    assert shorter != code
    names: dict = {}
    exec(compile(shorter, f"docs/recipes.md: {heading}", "exec"), names)
    assert capsys.readouterr().out.strip()
    if "engine" in names:
        names["engine"].close()
