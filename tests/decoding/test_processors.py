"""Logits processors in the library's own loops: on the accepted path only, once per position, in order."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig

NEW = 24
CONFIG = SpecExtendConfig.specextend(tree=TreeConfig(12, 4, 0.0), retrieval=RetrievalConfig(8, 6, 2))
SAMPLED = SamplingConfig(0.8, top_k=20, seed=3)


class Watching(LogitsProcessor):
    """Changes nothing, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == scores.shape[0] == 1 and scores.dtype == torch.float32
        self.asked.append(input_ids[0].tolist())
        return scores


@pytest.fixture
def engine(make_engine, make_model, perturbed):
    target = make_model("gqa")
    return make_engine(target, perturbed(target, 0.02), CONFIG)


@pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_processor_that_changes_nothing_leaves_every_round_as_it_is(sampling, engine, make_prompt):
    prompt, watching = make_prompt(60), Watching()
    plain = engine.generate(prompt, NEW, sampling=sampling)
    watched = engine.generate(prompt, NEW, sampling=sampling, processors=[watching])
    assert [(one.tokens, one.drafted, one.accepted) for one in watched.rounds] == [
        (one.tokens, one.drafted, one.accepted) for one in plain.rounds
    ]
    assert plain.accepted_per_round > 0, "nothing was accepted, so nothing was tested"
    text = prompt.tolist() + watched.token_ids
    assert watching.asked[:NEW] == [text[: 60 + position] for position in range(NEW)]


@pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_processed_tokens_do_not_depend_on_who_drafts(sampling, engine, make_prompt):
    prompt, rules = make_prompt(60), [RepetitionPenaltyLogitsProcessor(1.5)]
    alone = engine.with_config(SpecExtendConfig(drafting="none")).generate(
        prompt, NEW, sampling=sampling, processors=rules
    )
    assert alone.accepted_per_round == 0
    for config in (CONFIG, SpecExtendConfig.standard(tree=TreeConfig(6, 3, 0)), SpecExtendConfig(drafting="lookup")):
        other = engine.with_config(config).generate(prompt, NEW, sampling=sampling, processors=rules)
        assert other.token_ids == alone.token_ids
    assert alone.token_ids != engine.generate(prompt, NEW, sampling=sampling).token_ids


def test_processors_pass_by_loops_that_know_none(engine, make_prompt, monkeypatch):
    """A captured loop stands in `_speculative`: it decodes unless there are processors."""
    called = []
    plain = engine._speculative
    monkeypatch.setattr(engine, "_speculative", lambda *request: called.append(request) or plain(*request))
    engine.generate(make_prompt(20), 4, processors=[Watching()])
    assert not called
    engine.generate(make_prompt(20), 4)
    assert len(called) == 1


def test_until_is_asked_after_every_token_and_ends_there(engine, make_prompt):
    seen = []

    def until(token_ids: list[int]) -> bool:
        seen.append(len(token_ids))
        return len(token_ids) == 7

    result = engine.generate(make_prompt(20), NEW, until=until)
    assert seen == list(range(1, 8)) and result.new_tokens == 7 and result.finish_reason == "stop"
