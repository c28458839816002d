"""What the doors load that take either kind of draft, and the server with a head."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import httpx
import pytest

from eagle import entry
from specextend.cli import flags
from specextend.models.presets import BUNDLED_DIR


@pytest.mark.parametrize(
    ("words", "loads"),
    [
        ("", "small"),
        ("--head eagle1", "head"),
        ("-m smollm2", "head"),
        ("-m smollm2 --draft_model some/where", "small"),
        (f"--draft_model {BUNDLED_DIR / 'eagle1'}", "head"),
        (f"-m smollm2 --draft_model {BUNDLED_DIR / 'draft'}", "small"),
        ("-m llama31_8b", "head"),
        ("-m vicuna_7b", "small"),
    ],
)
def test_a_head_drafts_where_it_is_named_or_nothing_else_is_known(words, loads, monkeypatch):
    parser = flags.parser("test")
    entry.add_model_flags(parser)
    monkeypatch.setattr(entry, "load_pair", lambda args: "head")
    monkeypatch.setattr(entry.commands, "load_pair", lambda args: "small")
    assert entry.load_either(parser.parse_args(words.split())) == loads


def test_the_server_answers_with_a_head(bundled_engine):
    pytest.importorskip("fastapi")
    command = [sys.executable, "-m", "eagle.serve", "--head", "eagle3", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = re.search(r"http://[\w.:]+/v1", server.stdout.readline())[0]
            body = {"model": "bundled", "prompt": "The king said that the", "max_tokens": 12, "temperature": 0}
            answer = httpx.post(f"{url}/completions", json=body, timeout=60).json()
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    assert answer["choices"][0]["text"] == bundled_engine.generate(body["prompt"], 12).text
    assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0
