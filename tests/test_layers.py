"""Imports go one way through the rooms, and no module imports itself by way of others; not even for types."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# from the top: a room imports what stands on lines below its own, and itself
LAYERS = """
    __init__ serve.__main__
    cli
    serve race integrations evaluation
    engine
    decoding data
    models
    drafting policy
    modeling
    trees
    kernels
    config methods errors
"""
HEIGHT = {room: -line for line, rooms in enumerate(LAYERS.strip().splitlines()) for room in rooms.split()}
FOUNDATION = {"config", "methods", "errors"}  # files of one room


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for name in ("specextend", "eagle") for path in sorted((ROOT / name).rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """Our modules that the source of `module` names in any import, wherever it stands."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}, line {node.lineno}: a relative import; write the whole name"
            for alias in node.names:  # a module, or a name in one
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else node.module)
    return names & MODULES.keys()


IMPORTS = {module: imports_of(module) for module in MODULES}


def room_of(module: str) -> str:
    _, _, inside = module.partition(".")
    return inside if inside in HEIGHT else inside.partition(".")[0] or "__init__"


def may_import(upper: str, lower: str) -> bool:
    rooms = room_of(upper), room_of(lower)
    return rooms[0] == rooms[1] or FOUNDATION.issuperset(rooms) or HEIGHT[rooms[0]] > HEIGHT[rooms[1]]


def test_every_module_has_a_place():
    assert {room_of(module) for module in MODULES if module.startswith("specextend")} == HEIGHT.keys()


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("specextend")])
def test_module_imports_lower_rooms_alone(module):
    wrong = [other for other in IMPORTS[module] if other.startswith("eagle") or not may_import(module, other)]
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_no_module_imports_itself_by_way_of_others():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))
