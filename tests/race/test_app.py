"""app.py: mistakes are one line and status 2 before anything is served."""

from __future__ import annotations

import importlib.util
import socket
import sys
from pathlib import Path

import pytest

from specextend.cli import flags

ROOT = Path(__file__).parents[2]


@pytest.fixture
def app(monkeypatch, capsys):
    """app(*given): (status, stderr) of `app.py`, which is expected to end by itself."""
    spec = importlib.util.spec_from_file_location("app", ROOT / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*given: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["app.py", *given])
        with pytest.raises(SystemExit) as exit_:
            flags.run(module.main)
        return exit_.value.code, capsys.readouterr().err

    return call


def test_port_that_is_taken_gives_one_line_and_status_2(app):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, error = app("--port", port)
    assert status == 2 and port in error and "another --host or --port" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "given, message",
    [
        ("-m no-such-model", "no-such-model"),
        ("--head eagle9", "eagle9"),
        ("--device tpu", "tpu"),
        ("--port many", "many"),
        ("--port 99999", "99999"),
    ],
)
def test_bad_flag_gives_one_line_and_status_2(given, message, app):
    pytest.importorskip("gradio")
    status, error = app(*given.split())
    assert status == 2 and message in error and error.count("\n") == 1 and "Traceback" not in error


def test_without_gradio_the_line_says_how_to_get_it(app, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, error = app()
    assert status == 2 and "pip install" in error and "gradio" in error and error.count("\n") == 1
