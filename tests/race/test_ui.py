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
from specextend.race.ui import RaceCancelled, RaceQueue, lengths


class Track:
    """Races that last until `finish` is set; remembers their new tokens, and how many ran at once."""

    def __init__(self):
        tokenizer = SimpleNamespace(template=None)
        self.engine = SimpleNamespace(
            encode=lambda text: torch.zeros(100, dtype=torch.long), models=SimpleNamespace(preset=tokenizer)
        )
        self.running, self.most, self.began, self.finish = 0, 0, [], threading.Event()

    def run(self, prompt, new_tokens, sampling, report):
        self.running += 1
        self.most = max(self.most, self.running)
        self.began.append(new_tokens)
        try:
            while not self.finish.wait(0.002):
                report(Progress("SpecExtend", 80, new_tokens))
            return f"race {new_tokens}"
        finally:
            self.running -= 1


@pytest.fixture
def races(tmp_path, monkeypatch) -> RaceQueue:
    monkeypatch.setattr(ui, "POLL_S", 0.01)
    return RaceQueue(Track(), tmp_path)


class Page(threading.Thread):
    """A page that follows its race: what it was told, the end or the cancellation last."""

    def __init__(self, races: RaceQueue, session: str, new_tokens: int):
        super().__init__(daemon=True)
        self._race = races.race(session, None, 50, new_tokens, SamplingConfig())
        self.told: list = []
        self.start()

    def run(self) -> None:
        try:
            for moment in self._race:
                self.told.append(moment)
        except RaceCancelled as error:
            self.told.append(error)

    def last(self):
        self.join(timeout=20)
        return self.told[-1]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def test_second_race_waits_for_the_first(races):
    first = Page(races, "a", 1)
    wait_for(lambda: races.track.running)
    second = Page(races, "b", 2)
    wait_for(lambda: second.told)
    races.track.finish.set()
    assert (first.last(), second.last()) == ("race 1", "race 2")
    assert races.track.most == 1 and second.told[0].label == "Waiting for another race"


def test_session_cancels_its_own_race_alone(races):
    first = Page(races, "a", 1)
    wait_for(lambda: races.track.running)
    second = Page(races, "b", 2)
    wait_for(lambda: second.told)
    races.cancel("nobody")
    races.cancel("a")
    assert isinstance(first.last(), RaceCancelled)
    wait_for(lambda: races.track.began == [1, 2])
    races.track.finish.set()
    assert second.last() == "race 2"


def test_race_that_is_cancelled_while_it_waits_never_begins(races):
    first = Page(races, "a", 1)
    wait_for(lambda: races.track.running)
    second = Page(races, "b", 2)
    wait_for(lambda: second.told)
    races.cancel("b")
    assert isinstance(second.last(), RaceCancelled)
    races.track.finish.set()
    assert first.last() == "race 1" and races.track.began == [1]


def test_page_is_free_at_once_while_the_cancelled_race_finishes_its_step(races, monkeypatch):
    step = threading.Event()
    monkeypatch.setattr(races.track, "run", lambda *_: step.wait(20))
    page = Page(races, "a", 1)
    wait_for(lambda: page.told)
    races.cancel("a")
    assert isinstance(page.last(), RaceCancelled) and not step.is_set()
    step.set()


def test_page_that_is_left_ends_its_race(races):
    race = races.race("a", None, 50, 1, SamplingConfig())
    next(race)
    wait_for(lambda: races.track.running)
    race.close()
    wait_for(lambda: not races.track.running)
    races.cancel("a")  # has nothing to cancel any more
    races.track.finish.set()
    assert list(races.race("a", None, 50, 3, SamplingConfig()))[-1] == "race 3"


def test_cancelling_is_the_last_word_on_the_page(races):
    """No progress, error or result follows it, whatever the race does meanwhile."""
    models = races.track.engine.models
    models.name, models.draft_id, models.device = "target", "draft", torch.device("cpu")
    races.track.engine.limit = 16384
    page = ui.build(races)
    functions = {one.name: one.fn for one in page.fns.values()}
    assert not any(one.cancels for one in page.fns.values()), "gradio would cut the last message off"
    request = SimpleNamespace(session_hash="a")
    updates = functions["run"](ui.BUILTIN, None, 512, 128, 0.0, request=request)
    said = []
    for update in updates:
        said.append(next((value for value in update.values() if isinstance(value, str) and "line" in value), ""))
        if "80 of 128 tokens" in said[-1]:
            functions["end"](request=request)
            races.track.finish.set()  # it wins the race against its cancellation
            races._thread.submit(lambda: None).result()
    assert "The race was cancelled." in said[-1] and sum("cancelled" in one for one in said) == 1


def test_document_that_cannot_be_used_ends_the_race_with_its_line(races, tmp_path):
    (tmp_path / "x.docx").write_text("x")
    races.track.finish.set()
    with pytest.raises(InputError, match="x.docx"):
        list(races.race("a", tmp_path / "x.docx", 50, 1, SamplingConfig()))
    assert list(races.race("a", None, 50, 3, SamplingConfig()))[-1] == "race 3"


def test_lengths_fit_the_model_and_the_machine():
    assert lengths(16384, "cpu") == [512, 1024, 2048, 4096, 8192]
    assert lengths(32768, "cuda")[-1] == 16384
    assert lengths(16384, "cuda")[-1] == 8192
    assert lengths(600, "cpu") == [88]


def test_build_makes_the_page(bundled_engine, tmp_path):
    track = SimpleNamespace(engine=bundled_engine)
    page = ui.build(RaceQueue(track, tmp_path))
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Document", "Prompt, tokens", "New tokens", "Temperature"} <= labels
