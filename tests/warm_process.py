"""Commands in processes of their own that need not import everything first: each is forked from one that has.

    with WarmProcesses() as warm:
        done = warm.run("scripts.train", "--corpus", folder)    # as python -m scripts.train --corpus FOLDER would end

A child has its own arguments, environment, folder and files; only the imports were made before. What a program takes
from the environment or the clock while it is imported, and what its imports cost or fail at, needs a process of its own
from the start.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATIENCE_S = 1500.0  # of whoever waits for a child
MODULES = (
    "accelerate", "torch.distributed.tensor", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3",
    "transformers.generation.utils", "run_classic", "eval_classic", "run_eagle", "eagle.models", "eagle.entry",
    "specextend.cli.commands", "specextend.engine", "specextend.models.loading", "specextend.evaluation.run",
    "scripts.train.generation", "scripts.train.heads", "scripts.train.measure", "scripts.train.trainer",
)  # fmt: skip


class WarmProcesses:
    """Starts the process to fork from; ends it at the end."""

    def __enter__(self) -> WarmProcesses:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # no threads: they do not fork
        self._parent = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        self._parent.stdin.close()
        self._parent.wait()
        self._parent.stdout.close()

    def run(self, program: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess:
        """What `subprocess.run` says of `program`, a module or a path, when it has ended."""
        return self.start(program, *arguments, **options).wait()

    def start(
        self, program: str, *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None
    ) -> Started:
        """A child that runs beside this process; `env` is added to the environment."""
        folder = Path(tempfile.mkdtemp())
        command = [program, *map(str, arguments)]
        asked = {"command": command, "folder": str(folder), "cwd": str(cwd), "env": dict(env or {})}
        return Started(self, command, folder, self.ask(asked)["pid"])

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        self._parent.stdin.write(json.dumps(what) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())


class Started:
    """A child, and where its output goes."""

    def __init__(self, warm: WarmProcesses, command: list[str], folder: Path, pid: int):
        self._warm, self._command, self._folder, self.pid = warm, command, folder, pid

    def wait(self) -> subprocess.CompletedProcess:
        status = self._warm.ask({"wait": self.pid})["status"]
        out, err = (self._folder / name for name in ("stdout", "stderr"))
        done = subprocess.CompletedProcess(self._command, status, out.read_text(), err.read_text())
        out.unlink(), err.unlink(), self._folder.rmdir()
        return done


# ---- the process that is forked


def serve() -> dict[str, Any] | None:
    """Answer one request after the other; returns in each child with what it is to do, here when nobody asks."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that an import prints is an answer
    for module in MODULES:
        importlib.import_module(module)
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = {"status": ended(asked["wait"])}
        else:
            pid = os.fork()
            if not pid:
                return asked
            answer = {"pid": pid}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return None


def ended(pid: int) -> int:
    """The status of a child that has ended, or that was ended for taking too long."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def become(asked: dict[str, Any]) -> None:
    """Take the place of the process that was asked for."""
    program, *arguments = asked["command"]
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(asked["folder"], name), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")
    else:
        sys.path[0] = asked["cwd"]
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    todo = serve()
    if todo is not None:
        become(todo)
