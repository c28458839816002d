"""scripts/reproduce_all.sh, its commands printed instead of run."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from specextend.cli import commands, flags
from specextend.evaluation.environment import ROOT
from specextend.methods import METHODS

SCRIPT = ROOT / "scripts" / "reproduce_all.sh"


def commands_of(*arguments: str, **environment: str | Path) -> tuple[list[str], str, int]:
    """Printed lines, stderr and status, with `echo` for Python."""
    values = os.environ | {"PYTHON": "echo"} | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(["bash", SCRIPT, *arguments], env=values, capture_output=True, text=True)
    return done.stdout.splitlines(), done.stderr, done.returncode


def flag(command: str, name: str) -> str | None:
    words = shlex.split(command)
    return words[words.index(name) + 1] if name in words else None


def is_command(line: str) -> bool:
    return line.startswith("-m ") or line.split()[0].endswith(".py")


def program(command: str) -> Path:
    """The file that a command starts, a script or a module."""
    first, second, *_ = command.split()
    return ROOT / (second.replace(".", "/") + ".py" if first == "-m" else first)


@pytest.mark.parametrize("what", ["bundled", "paper"])
def test_every_method_is_measured_and_ends_in_tables_and_figures(what, tmp_path):
    lines, _, status = commands_of(what, DATA=tmp_path, OUT=tmp_path / "out")
    commands = [line for line in lines if is_command(line)]
    assert status == 0 and all(program(line).exists() for line in commands)
    measured = [shlex.split(line.split("--method ")[1].split(" --")[0]) for line in commands if "--method " in line]
    assert {method for methods in measured for method in methods} == set(METHODS)
    names = [program(line).name for line in commands]
    assert {"eval_classic.py", "eval_eagle.py", "needle.py", "analyse.py"} < set(names)
    assert names[-2:] == ["plots.py", "tables.py"]
    files = [flag(line, "--output_file") for line in commands if flag(line, "--output_file")]
    assert all(Path(file).is_relative_to(tmp_path / "out") for file in files)


def test_data_sets_that_are_there_are_used_and_the_built_in_text_where_none_is(tmp_path):
    lines, _, _ = commands_of(DATA=tmp_path)
    assert lines[0].startswith("scripts/prepare_data.py --builtin") and {
        Path(flag(line, "--data_dir")).name for line in lines if flag(line, "--data_dir")
    } == {"builtin"}
    for name in ("pg19", "govreport"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_1K.jsonl").touch()
    lines, _, _ = commands_of(DATA=tmp_path)
    sets = [Path(flag(line, "--data_dir")).name for line in lines if flag(line, "--data_dir")]
    assert set(sets) == {"govreport", "pg19"} and sets[0] == "govreport"


def test_paper_says_first_what_it_will_take(tmp_path):
    lines, _, _ = commands_of("paper", DATA=tmp_path)
    said = " ".join(lines[:3])
    assert "GB" in said and "hours" in said and not any(map(is_command, lines[:3]))


def test_gpu_measures_arms_beside_each_other_and_ends_in_their_pages(tmp_path):
    lines, _, status = commands_of("gpu", DATA=tmp_path, OUT=tmp_path / "out")
    assert status == 0 and all(is_command(line) and program(line).exists() for line in lines)
    measured = [line for line in lines if line.startswith("eval_")]
    records = [Path(flag(line, "--output_file")).relative_to(tmp_path / "out").as_posix() for line in measured]
    assert len(set(records)) == len(records) and {Path(one).parent.name for one in records} == {
        path.name for path in (ROOT / "results" / "h200").iterdir() if path.is_dir() and path.name != "logs"
    } - {"fast_4k"}
    apart = ("ablation", "rivals", "sweep")
    assert all("specextend:tree=price" in line for line in measured if not any(name in line for name in apart))
    assert program(lines[-1]).name == "evidence.py"
    _, error, status = commands_of("gpu", "--ray", DATA=tmp_path)
    assert status == 2 and error.count("\n") == 1 and "one process" in error


@pytest.mark.parametrize("what", ["bundled", "gpu", "paper"])
def test_every_flag_of_an_evaluation_is_one_that_it_has(what, bundled_models, tmp_path, monkeypatch):
    lines, _, _ = commands_of(what, DATA=tmp_path, OUT=tmp_path / "out")
    parsed = []
    monkeypatch.setattr(commands, "measure", lambda args, load: parsed.append(args))
    for line in filter(lambda line: line.startswith("eval_"), lines):
        script, *words = shlex.split(line)
        monkeypatch.setattr("sys.argv", [script, *words])
        importlib.import_module(script.removesuffix(".py")).main()
        if what == "gpu":
            assert len(flags.arm_configs(parsed[-1], bundled_models)) == len(parsed[-1].arms)
    assert len(parsed) > 5


def test_anything_else_is_refused_with_one_line():
    lines, error, status = commands_of("papers")
    assert (lines, status) == ([], 2) and "say bundled, gpu or paper" in error and error.count("\n") == 1


def test_flags_of_ray_reach_the_evaluations_alone(tmp_path):
    for words in (["--ray", "--max_workers", "2"], ["bundled", "--ray", "--max_workers", "2"]):
        lines, _, status = commands_of(*words, DATA=tmp_path)
        spread = [line for line in lines if line.endswith(" --ray --max_workers 2")]
        assert status == 0 and spread == [line for line in lines if line.split()[0].startswith("eval_")]
