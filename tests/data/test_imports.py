"""Imports point one way: models and data know nothing of the engine and of what is above it, and make no circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
ABOVE = ("engine", "decoding", "evaluation", "integrations", "serve", "race", "cli")


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, those for types alone and in functions included."""
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {
        node.module for node in found if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spec")
    }


def test_models_and_data_import_nothing_above_them_and_make_no_circle():
    files = [path for room in ("models", "data") for path in (ROOT / "specextend" / room).rglob("*.py")]
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imports_of(path) for path in files}
    above = {f"specextend.{name}" for name in ABOVE}
    for module, imported in graph.items():
        assert not [name for name in imported if ".".join(name.split(".")[:2]) in above], module
    list(TopologicalSorter(graph).static_order())  # CycleError
