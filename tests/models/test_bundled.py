"""The pair that ships with the project: lossless, and SpecExtend does for it what it is for.

These tests fail when the weights are missing; they are never skipped.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import eagle
from scripts.train.card import write_longer_card
from specextend import SpecExtend
from specextend.config import SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.data.builtin import builtin_text
from specextend.decoding.output import Generation
from specextend.evaluation.plan import public_name
from specextend.models.presets import BUNDLED_DIR, LONG_DIR, public_id

pytestmark = pytest.mark.xdist_group("bundled")  # long prompts are answered once for several tests
NEW = 32
STANDARD, SPECEXTEND = SpecExtendConfig.standard(), SpecExtendConfig.specextend()


@pytest.fixture(scope="module")
def document(bundled_engine) -> torch.Tensor:
    """Tokens of the built-in text, enough for the longest prompt here."""
    return bundled_engine.encode(builtin_text()[:40_000])[:2500]


@pytest.fixture(scope="module")
def alone(bundled_engine, document) -> dict[int, list[int]]:
    """What the target alone continues prompts of several lengths with, greedily."""
    return {n: bundled_engine.autoregressive(document[:n], NEW).token_ids for n in (2500, 400, 30, 1)}


def test_bundled_pair_fits_together(bundled_models):
    assert bundled_models.target.config.vocab_size == bundled_models.draft.config.vocab_size
    assert bundled_models.limit == 16384
    assert bundled_models.eos_token_ids


def test_bundled_weights_are_small_enough_to_travel():
    size = {
        folder.name: (folder / "model.safetensors").stat().st_size
        for folder in BUNDLED_DIR.iterdir()
        if folder.is_dir()
    }
    assert size["target"] + size["draft"] < 40_000_000 and size["eagle1"] < 5_000_000 and size["eagle3"] < 9_000_000


def test_bundled_target_alone_equals_hugging_face_generate(alone, document):
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_DIR / "target", dtype=torch.float32)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    for length, tokens in alone.items():
        prompt = document[:length][None]
        theirs = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(tokens), do_sample=False, pad_token_id=0
        )
        assert theirs[0, length:].tolist() == tokens


@pytest.mark.parametrize(
    "config",
    [STANDARD, SPECEXTEND, replace(SPECEXTEND, draft_cache="streaming")],
    ids=["standard", "specextend", "streaming"],
)
def test_bundled_pair_keeps_the_targets_output(config, bundled_engine, document, alone):
    engine = bundled_engine.with_config(replace(config, tree=TreeConfig(16, 5, 0.3)))
    sampling = SamplingConfig(0.8, seed=1)
    for length, tokens in alone.items():
        assert engine.generate(document[:length], NEW).token_ids == tokens
    sampled = engine.autoregressive(document[:400], NEW, sampling=sampling).token_ids
    assert engine.generate(document[:400], NEW, sampling=sampling).token_ids == sampled != alone[400]


def test_bundled_draft_is_of_use(bundled_engine, document):
    result = bundled_engine.with_config(SPECEXTEND).generate(document[:1000], NEW)
    assert result.accepted_per_round >= 1


def test_specextend_accepts_more_than_standard_on_a_long_prompt(bundled_engine, document):
    standard, ours = (
        bundled_engine.with_config(config).generate(document, 2 * NEW) for config in (STANDARD, SPECEXTEND)
    )
    assert ours.token_ids == standard.token_ids
    assert ours.accepted_per_round > standard.accepted_per_round


def test_bundled_text_round_trips_and_streams(bundled_engine):
    text = "The import statement — “Größe”, 漢字, 😀\n\tindented\n"
    ids = bundled_engine.encode(text)
    assert bundled_engine.models.tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()
    prompt = builtin_text()[:2000]
    pieces = list(bundled_engine.stream(prompt, NEW))
    assert "".join(pieces) == bundled_engine.generate(prompt, NEW).text != ""


# ---- the EAGLE heads


@pytest.fixture(scope="module", params=["eagle1", "eagle3"])
def head_engine(request) -> SpecExtend:
    return SpecExtend(eagle.load_models("bundled", head=request.param, device="cpu"))


@pytest.fixture(scope="module")
def answers(head_engine, document) -> Callable[[SpecExtendConfig], dict[int, Generation]]:
    """answers(config): to prompts of the lengths of `alone`, the longest first; one engine for each config."""

    @functools.cache
    def of(config: SpecExtendConfig) -> dict[int, Generation]:
        engine = head_engine.with_config(config)
        return {n: engine.generate(document[:n], NEW) for n in (2500, 400, 30, 1)}

    return of


@pytest.mark.parametrize("config", [STANDARD, SPECEXTEND], ids=["standard", "specextend"])
def test_bundled_heads_are_lossless(config, answers, alone):
    assert {length: answer.token_ids for length, answer in answers(config).items()} == alone


def test_bundled_heads_are_of_use_and_retrieval_keeps_them_so(answers):
    short, long, collapsed = answers(SPECEXTEND)[400], answers(SPECEXTEND)[2500], answers(STANDARD)[2500]
    assert short.accepted_per_round > 1 and long.accepted_per_round > collapsed.accepted_per_round


def test_bundled_draft_vocabulary_is_used(head_engine):
    head = head_engine.models.draft
    if head.target_ids is not None:
        assert len(head.target_ids) == 4096 and bool((head.target_ids.diff() > 0).all())
        assert head_engine.models.draft_id == "bundled/eagle3"


def test_default_head_of_the_bundled_target_is_eagle3():
    assert eagle.load_models("bundled", device="cpu").draft_id == "bundled/eagle3"


@pytest.mark.parametrize("name", ["target", "draft", "eagle3"])
def test_the_bundled_models_have_one_name_however_their_folder_is_given(name, monkeypatch):
    monkeypatch.chdir(BUNDLED_DIR.parent)
    for given in (str(BUNDLED_DIR / name), f"bundled/{name}", f"../models/bundled/{name}"):
        assert public_id(given) == public_name(given) == f"bundled/{name}"
    assert public_id("org/model") == "org/model" and public_name("none") == "none"


# ---- at eight times its positions


def test_the_longer_target_holds_long_inputs_and_takes_the_same_drafts(document):
    loaded = eagle.load_models("bundled_128k", device="cpu")
    assert loaded.limit > 2**17 and (loaded.target_id, loaded.draft_id) == ("bundled_128k", "bundled/eagle3")
    for engine in (SpecExtend(loaded), SpecExtend.from_pretrained("bundled_128k", device="cpu")):
        alone = engine.autoregressive(document, NEW).token_ids
        answer = engine.with_config(SPECEXTEND).generate(document, NEW)
        assert answer.token_ids == alone and answer.accepted_per_round > 1


def test_the_longer_targets_card_is_written_from_its_record():
    assert (LONG_DIR / "model.safetensors").stat().st_size < 30_000_000
    record = json.loads((LONG_DIR / "training_record.json").read_text())
    assert (LONG_DIR / "README.md").read_text() == write_longer_card(record)
