"""Races: the record is what the engines wrote, with each token's origin and time, and the chunks the draft read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from specextend.config import RetrievalConfig, SamplingConfig
from specextend.data.builtin import builtin_text
from specextend.data.encoded import EncodedPrompt
from specextend.decoding.output import Generation, Round
from specextend.errors import CapacityError, ModelError
from specextend.race.record import Progress, Race, Racetrack, differs_at, steps_of

pytestmark = pytest.mark.xdist_group("race")  # one race serves most of them
NEW = 30


@pytest.fixture(scope="module")
def engine(bundled_engine):
    """The bundled pair whose draft reads 4 chunks of 32 tokens."""
    return bundled_engine.with_config(replace(bundled_engine.config, retrieval=RetrievalConfig(top_k=4)))


@pytest.fixture(scope="module")
def prompt(engine) -> EncodedPrompt:
    return EncodedPrompt(engine.encode(builtin_text()[:4000])[:300], "text", 1000)


@pytest.fixture(scope="module")
def track(engine) -> Racetrack:
    return Racetrack(engine)


@pytest.fixture(scope="module")
def race(track, prompt) -> Race:
    return track.run(prompt, NEW)


def test_every_lane_writes_what_the_target_alone_writes(race, engine, prompt):
    expected = engine.autoregressive(prompt.ids, NEW)
    assert [lane.method for lane in race.lanes] == ["autoregressive", "standard", "specextend"]
    for lane in race.lanes:
        assert lane.token_ids == expected.token_ids and lane.text == expected.text
    assert race.differs_at is None


def test_origins_are_those_of_the_rounds_accepted_first(race, engine, prompt):
    autoregressive, _, specextend = race.lanes
    assert [(len(step.pieces), step.accepted) for step in autoregressive.steps] == [(1, 0)] * NEW
    result = engine.generate(prompt.ids, NEW)
    rounds = [(len(one.tokens), one.accepted) for one in result.rounds]
    assert [(len(step.pieces), step.accepted) for step in specextend.steps] == [(1, 0), *rounds]
    assert sum(step.accepted for step in specextend.steps) > NEW / 3
    assert specextend.accepted_per_round == result.accepted_per_round


def test_times_are_the_engines_and_only_grow(race):
    for lane in race.lanes:
        times = [step.at_s for step in lane.steps]
        assert times == sorted(times) and times[0] > 0
        assert times[-1] == pytest.approx(lane.total_s, abs=1e-5)
        decode = (len(lane.token_ids) - 1) / lane.decode_tokens_per_s
        assert times[-1] - times[0] == pytest.approx(decode, abs=1e-5)


def test_chunks_are_those_that_the_draft_was_given(race):
    assert [selection.round for selection in race.selections] == list(range(0, len(race.lanes[2].steps) - 1, 4))
    first = race.selections[0]
    assert first.of == 10 and len(first.chunks) == 4 and first.chunks[-1] == 9


def test_chunks_of_a_run_that_went_otherwise_are_not_shown(track, prompt, monkeypatch):
    other, generate = Generation(300, [1], "", "length", [Round([1], 0, 0, {})], {"target": 1.0}), track.engine.generate
    monkeypatch.setattr(track.engine, "generate", lambda *a, **b: other if b.get("observer") else generate(*a, **b))
    assert track.run(prompt, 6).selections == []


def test_sampled_lanes_are_equal_too(track, prompt):
    sampled = track.run(prompt, NEW, SamplingConfig(temperature=1.2, seed=3))
    assert sampled.differs_at is None and len({lane.text for lane in sampled.lanes}) == 1
    assert sampled.lanes[0].token_ids != track.run(prompt, NEW).lanes[0].token_ids


def test_progress_names_each_lane_in_turn_and_counts_its_tokens(track, prompt):
    seen: list[Progress] = []
    track.run(prompt, 8, report=seen.append)
    turns = list(dict.fromkeys(one.label for one in seen))
    turns[1:4] = sorted(turns[1:4])  # their order alternates
    assert turns == [
        "Warming up", "Autoregressive", "SpecExtend", "Standard speculative", "Chunks the draft read",
    ]  # fmt: skip
    assert [one.tokens for one in seen if one.label == "Autoregressive"] == [None, *range(1, 9)]


def test_order_of_the_lanes_alternates_and_that_of_the_record_does_not(engine, prompt):
    track, orders = Racetrack(engine), []
    for _ in range(3):
        seen: list[Progress] = []
        lanes = [lane.label for lane in track.run(prompt, 4, report=seen.append).lanes]
        assert lanes == ["Autoregressive", "Standard speculative", "SpecExtend"]
        orders.append(list(dict.fromkeys(one.label for one in seen if one.label in lanes)))
    assert orders == [lanes, lanes[::-1], lanes]


def test_every_lane_is_warmed_up_at_the_races_own_length(engine, prompt):
    track, calls = Racetrack(engine), []

    def recorded(name: str, generate):
        def call(ids, new_tokens, **options) -> Generation:
            calls.append((name, len(ids), new_tokens, []))
            on_round = options.pop("on_round")
            count = calls[-1][-1]
            return generate(ids, new_tokens, on_round=lambda *at: (count.append(at[1]), on_round(*at)), **options)

        return call

    track._lanes = {name: recorded(name, generate) for name, generate in track._lanes.items()}
    track.run(prompt, NEW)
    assert [call[:3] for call in calls] == 2 * [(name, len(prompt.ids), NEW) for name in track._lanes]
    rounds = [len(call[3]) - 1 for call in calls]
    assert rounds[0] == 6 and rounds[3] == NEW - 1, "a warm-up is a few rounds, not a second race"
    assert all(short <= 6 for short in rounds[:3]) and rounds[2] > 4, "the working cache is refreshed in it"


def test_race_that_was_stopped_leaves_nothing_to_the_next(track, race, prompt):
    class Stopped(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.label == "SpecExtend" and progress.tokens and progress.tokens > 3:
            raise Stopped

    with pytest.raises(Stopped):
        track.run(prompt, NEW, report=stop)
    again = track.run(prompt, NEW)
    assert [lane.token_ids for lane in again.lanes] == [lane.token_ids for lane in race.lanes]
    assert again.selections == race.selections


def test_prompt_that_does_not_fit_is_refused(track, engine):
    ids = torch.zeros(engine.limit, dtype=torch.long)
    with pytest.raises(CapacityError, match=str(engine.limit)):
        track.run(EncodedPrompt(ids, "long", len(ids)), 8)


def test_race_without_a_draft_is_refused(bundled_models):
    from specextend import SpecExtend

    with pytest.raises(ModelError, match="draft"):
        Racetrack(SpecExtend(replace(bundled_models, draft=None)))


def test_record_survives_json(race):
    assert Race.from_dict(json.loads(json.dumps(race.to_dict()))) == race


def test_character_split_over_tokens_comes_with_the_token_that_completes_it():
    ids = list("a€b".encode())
    result = Generation(1, ids, "a€b", "length", [Round(ids[1:3], 2, 1, {"verify": 2.0}), Round(ids[3:], 2, 1, {})], {})
    steps = steps_of(result, lambda part: bytes(part).decode(errors="replace"))
    assert [step.pieces for step in steps] == [["a"], ["", ""], ["€", "b"]]
    assert [step.at_s for step in steps] == [0.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "outputs, position", [([[1, 2]] * 3, None), ([[1, 2], [1, 2], [1, 3]], 1), ([[1, 2], [1], [2, 2]], 0)]
)
def test_differs_at_finds_the_first_difference_of_any_lane(outputs, position):
    assert differs_at(outputs) == position


def test_race_ends_between_two_blocks_of_a_prefill(engine, prompt):
    class Stopped(Exception):
        pass

    track, told = Racetrack(engine.with_config(prefill_block=100)), []

    def stop(progress: Progress) -> None:
        told.append(progress.tokens)
        if len(told) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        track.run(prompt, NEW, report=stop)
    assert told == [None, None]
