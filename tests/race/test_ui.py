"""The page's machinery: one race at a time, ended by whom it belongs to, and lengths that fit."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("gradio")

from specextend.config import SamplingConfig
from specextend.errors import InputError
from specextend.race import ui
from specextend.race.record import Progress
from specextend.race.ui import Arena, RaceStopped, lengths


class SlowTrack:
    """Races of a hundred short steps; remembers who ran, and how many at once."""

    def __init__(self):
        tokenizer = SimpleNamespace(template=None)
        self.engine = SimpleNamespace(
            encode=lambda text: torch.zeros(100, dtype=torch.long), models=SimpleNamespace(preset=tokenizer)
        )
        self.running, self.most, self.began = 0, 0, []

    def run(self, prompt, new_tokens, sampling, report):
        self.running += 1
        self.most = max(self.most, self.running)
        self.began.append(new_tokens)
        try:
            for token in range(100):
                time.sleep(0.004)
                report(Progress("SpecExtend", token, new_tokens))
            return f"race {new_tokens}"
        finally:
            self.running -= 1


@pytest.fixture
def arena(tmp_path, monkeypatch) -> Arena:
    monkeypatch.setattr(ui, "LOOK_S", 0.01)
    return Arena(SlowTrack(), tmp_path)


def follow(arena: Arena, visitor: str, new_tokens: int, into: dict) -> threading.Thread:
    def run() -> None:
        try:
            into[visitor] = list(arena.race(visitor, None, 50, new_tokens, SamplingConfig()))
        except RaceStopped as error:
            into[visitor] = error

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_second_race_waits_for_the_first(arena):
    seen: dict = {}
    threads = [follow(arena, "a", 1, seen), follow(arena, "b", 2, seen)]
    for thread in threads:
        thread.join(timeout=20)
    assert (seen["a"][-1], seen["b"][-1]) == ("race 1", "race 2") and arena.track.most == 1
    later = seen["b"] if arena.track.began == [1, 2] else seen["a"]
    assert later[0].label == "Waiting for another race"


def test_visitor_ends_the_own_race_alone(arena):
    seen: dict = {}
    first = follow(arena, "a", 1, seen)
    time.sleep(0.05)
    second = follow(arena, "b", 2, seen)
    arena.stop("nobody")
    time.sleep(0.05)
    arena.stop("a")
    first.join(timeout=20)
    second.join(timeout=20)
    assert isinstance(seen["a"], RaceStopped) and seen["b"][-1] == "race 2"


def test_race_that_is_ended_while_it_waits_never_begins(arena):
    seen: dict = {}
    first = follow(arena, "a", 1, seen)
    time.sleep(0.05)
    second = follow(arena, "b", 2, seen)
    time.sleep(0.05)
    arena.stop("b")
    first.join(timeout=20)
    second.join(timeout=20)
    assert seen["a"][-1] == "race 1" and isinstance(seen["b"], RaceStopped) and arena.track.began == [1]


def test_document_that_cannot_be_used_ends_the_race_with_its_line(arena, tmp_path):
    (tmp_path / "x.docx").write_text("x")
    with pytest.raises(InputError, match="x.docx"):
        list(arena.race("a", tmp_path / "x.docx", 50, 1, SamplingConfig()))
    assert list(arena.race("a", None, 50, 3, SamplingConfig()))[-1] == "race 3"


def test_lengths_fit_the_model_and_the_machine():
    assert lengths(16384, "cpu") == [512, 1024, 2048, 4096, 8192]
    assert lengths(32768, "cuda")[-1] == 16384
    assert lengths(16384, "cuda")[-1] == 8192
    assert lengths(600, "cpu") == [88]


def test_build_makes_the_page(bundled_engine, tmp_path):
    track = SimpleNamespace(engine=bundled_engine)
    page = ui.build(Arena(track, tmp_path))
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Document", "Prompt, tokens", "New tokens", "Temperature"} <= labels
