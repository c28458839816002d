"""Output files: refused before any work, whole or not there, and one writer at a time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specextend.errors import ConfigError
from specextend.evaluation import files
from specextend.evaluation.environment import ROOT
from specextend.evaluation.files import append_lines, check_output, locked, set_aside, write_whole

BAD = {
    "/proc/results/a.json": "cannot be written",
    "{tmp}/file/a.json": "cannot be written (Not a directory)",
    "{tmp}/file/deeper/a.json": "cannot be written (Not a directory)",
    "{tmp}/folder": "is a folder",
    "/dev/full": "is a device or a pipe",
    f"{{tmp}}/{'x' * 300}.json": "cannot be written (File name too long)",
    f"{{tmp}}/{'x' * 249}.json": "cannot be written (File name too long)",  # would fit without .tmp
    "{tmp}/a\0b.json": "cannot be written (embedded null byte)",
}


@pytest.mark.parametrize("name", BAD, ids=lambda name: repr(name[:40]))
def test_a_path_that_cannot_be_written_is_refused_with_one_line_and_nothing_is_left(name, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as error:
        check_output(Path(name.replace("{tmp}", str(tmp_path))))
    assert BAD[name] in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_checking_a_path_leaves_neither_files_nor_folders(tmp_path):
    check_output(tmp_path / "new" / "deep" / "a.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.json").write_text("old")
    check_output(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text() == "old"


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line_and_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old\n")
    monkeypatch.setattr(files.os, "fsync", full_disk)
    for write in (lambda: write_whole(path, "new"), lambda: append_lines(path, ["new"]), lambda: check_output(path)):
        with pytest.raises(ConfigError, match="No space left on device"):
            write()
        assert [one.name for one in tmp_path.iterdir()] == ["a.json"] and path.read_text() == "old\n"


def test_another_process_cannot_take_the_lock_until_it_is_given_back(tmp_path):
    path = tmp_path / "new" / "a.json"
    program = (
        "import sys; from pathlib import Path; from specextend.evaluation.files import locked\n"
        "with locked(Path(sys.argv[1])): pass"
    )

    def other() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, capture_output=True, text=True)

    with locked(path):
        refused = other()
        assert refused.returncode and "is being written by another evaluation" in refused.stderr
    assert not list(tmp_path.iterdir())
    assert other().returncode == 0


def test_what_is_set_aside_replaces_nothing(tmp_path):
    path = tmp_path / "a.json"
    assert set_aside(path) is None
    for content in ("one", "two", "three"):
        path.write_text(content)
        set_aside(path)
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {
        "a.json.bak": "one", "a.json.bak2": "two", "a.json.bak3": "three"
    }  # fmt: skip
