"""The project's own files agree with each other."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(page for room in ("docs", "data", "results", "specextend") for page in ROOT.glob(f"{room}/**/*.md")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_citation_names_this_version_its_license_and_the_paper():
    assert (CITATION["version"], CITATION["license"]) == (PROJECT["version"], PROJECT["license"])
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    assert "2505.20776" in CITATION["references"][0]["url"] and f"## {PROJECT['version']}" in changelog()


def test_license_is_the_one_that_is_declared():
    assert PROJECT["license-files"] == ["LICENSE"] and PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_ruff_has_one_version_everywhere():
    files = ("requirements-dev.txt", "pyproject.toml", ".pre-commit-config.yaml")
    assert {pin for name in files for pin in re.findall(r"ruff==([\d.]+)", (ROOT / name).read_text())} == {"0.17.6"}


@pytest.mark.xdist_group("known")
def test_groups_of_tests_are_known_to_xdist(request):
    """Or each worker would train, and start a cluster, for itself."""
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith("@known")


@pytest.mark.parametrize("room", sorted(path.parent.name for path in (ROOT / "specextend").glob("*/__init__.py")))
def test_every_room_is_on_the_map(room):
    assert f"`specextend/{room}/`" in (ROOT / "CONTRIBUTING.md").read_text()


def changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_to_files_that_are_there(page):
    links = re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))
    broken = [link for link in links if ":" not in link and not (page.parent / link).exists()]
    assert not broken
