"""`model.generate(custom_generate=specextend.custom_generate)`: transformers' tokens; the model stays as it is."""

from __future__ import annotations

import copy
import gc
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from histories import tokens_read
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import specextend
from eagle.models import load_head
from specextend import SpecExtend
from specextend.config import SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.errors import ConfigError, ModelError
from specextend.integrations.custom_generate import CustomGenerate
from specextend.integrations.twin import make_twin
from specextend.models.loading import load_models

NEW = 24
PROMPT = "The king said that the"
CONFIG = SpecExtendConfig.specextend(tree=TreeConfig(12, 4, 0.1))
EAGER_TREE = SpecExtendConfig.specextend(tree=TreeConfig(20, 5, 0.0))


@pytest.fixture(scope="module")
def pair(make_model, perturbed, hf_twin):
    """A target and a draft that is sometimes right, loaded as anybody would load them."""
    target = make_model("gqa")
    return hf_twin(target), hf_twin(perturbed(target, 0.05))


@pytest.fixture
def door() -> CustomGenerate:
    return CustomGenerate()


@pytest.fixture
def both(pair, door, make_prompt):
    """both(**options): ids by plain `generate` and by ours, of one prompt with one request."""

    def run(length: int = 60, **options) -> tuple[list[int], list[int]]:
        target, draft = pair
        request = {"max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False} | options
        ids = make_prompt(length)[None]
        plain = target.generate(ids, attention_mask=torch.ones_like(ids), **request)
        ours = target.generate(
            ids, attention_mask=torch.ones_like(ids), custom_generate=door, draft_model=draft,
            specextend_config=EAGER_TREE, **request,
        )  # fmt: skip
        return plain[0].tolist(), ours[0].tolist()

    return run


# ---- greedy: the same tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [5, 6, 7]},
        {"bad_words_ids": [[3], [4, 5]]},
        {"encoder_repetition_penalty": 1.5},  # written for one row: a batch of nodes would break it
        {"sequence_bias": {(10,): 5.0, (11, 12): -4.0}},
        {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 9},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [(int(ids[-1]) * 7 + step) % 97 for step in range(9)]},
        {"guidance_scale": 1.5},  # keeps a cache of its own, and so must be asked in order
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_greedy_tokens_are_plain_generates(options, both):
    plain, ours = both(**options)
    assert ours == plain and len(ours) > 60


def test_eos_and_lengths_are_plain_generates(both):
    plain, _ = both()
    eos = plain[60 + 9]
    for options in (
        {"eos_token_id": eos},
        {"eos_token_id": [96, eos]},
        {"eos_token_id": eos, "min_new_tokens": 15},
        {"eos_token_id": eos, "min_length": 75},
        {"max_new_tokens": None, "max_length": 66},
        {"max_new_tokens": 1},
        {"eos_token_id": eos, "forced_eos_token_id": eos, "min_new_tokens": 20},
    ):
        expected, ours = both(**options)
        assert ours == expected
    assert len(both(eos_token_id=eos)[1]) == 60 + plain[60:].index(eos) + 1


class Every(StoppingCriteria):
    """Ends once the ids add up to a multiple of 11, `least` tokens in."""

    def __init__(self, least: int):
        self.least, self.seen = least, []

    def __call__(self, input_ids, scores, **_):
        self.seen.append(input_ids.shape[1])
        ends = input_ids.shape[1] >= self.least and int(input_ids.sum()) % 11 == 0
        return torch.full((len(input_ids),), ends)


def test_own_stopping_criteria_and_processors_are_asked_as_plain_generate_asks(pair, door, make_prompt):
    class Counting(LogitsProcessor):
        """Depends on how often it was called, as no draft tree could know."""

        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            return scores.roll(self.calls // 6, dims=-1)

    target, draft = pair
    ids, seen = make_prompt(40)[None], []
    for options in ({}, {"custom_generate": door, "draft_model": draft, "specextend_config": CONFIG}):
        until = Every(50)
        out = target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, pad_token_id=0, do_sample=False,
            logits_processor=[Counting()], stopping_criteria=[until], **options,
        )  # fmt: skip
        seen.append((out.tolist(), until.seen))
    assert seen[0] == seen[1] and len(seen[0][1]) < 60


def test_stopping_criteria_are_given_the_scores_of_plain_generate(pair, door, make_prompt):
    class Surprised(StoppingCriteria):
        """Ends at the first token that is less likely than `limit`."""

        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **_):
            self.seen.append(scores and [round(float(row.softmax(-1).max()), 3) for row in scores])
            return torch.full((1,), bool(scores) and self.seen[-1][-1] < 0.12)

    target, draft = pair
    ids = make_prompt(40)[None]
    for wanted in ({"return_dict_in_generate": True, "output_scores": True}, {"output_scores": True}):
        seen = []
        for options in ({}, {"custom_generate": door, "draft_model": draft, "specextend_config": EAGER_TREE}):
            until = Surprised()
            target.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0, do_sample=False,
                stopping_criteria=[until], **wanted, **options,
            )  # fmt: skip
            seen.append(until.seen)
        assert seen[0] == seen[1] and len(seen[0]) > 1
        assert (seen[0][0] is None) == ("return_dict_in_generate" not in wanted)


class Grammar(LogitsProcessor):
    """As those that constrain an answer to a grammar: it follows the text, and knows no text behind the end."""

    def __init__(self, eos: int, most: int):
        self.eos, self.most = eos, most

    def __call__(self, input_ids, scores):
        assert int(input_ids[0, -1]) != self.eos, "asked behind the end"
        assert input_ids.shape[1] < self.most, "asked beyond max_length"
        return scores.roll(1, dims=-1)


@pytest.mark.skipif(find_spec("specextend.decoding.observer") is None, reason="the loops still ask behind the end")
def test_processors_are_not_asked_behind_the_end(pair, door, make_prompt):
    target, draft = pair
    ids = make_prompt(40)[None]
    request = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
    free = target.generate(ids, logits_processor=[Grammar(-1, 40 + NEW)], **request)
    for eos in (-1, *free[0, 45:60].tolist()):
        plain, ours = (
            target.generate(
                ids,
                logits_processor=[Grammar(eos, 40 + NEW)],
                eos_token_id=eos if eos >= 0 else None,
                **request,
                **door_,
            )
            for door_ in ({}, {"custom_generate": door, "draft_model": target, "specextend_config": EAGER_TREE})
        )
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("kind", ["tied", "qwen2", "qwen3", "mistral", "llama3", "dynamic"])
def test_every_family_is_plain_generates(kind, make_model, perturbed, hf_twin, door, make_prompt):
    ids = make_prompt(90)[None]  # and 24 more is within what dynamic rope holds here, and beyond where it changes
    request = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
    draft = hf_twin(perturbed(make_model(kind), 0.05))
    plain = hf_twin(make_model(kind)).generate(ids, repetition_penalty=1.2, **request)
    model = hf_twin(make_model(kind))
    assert torch.equal(
        model.generate(ids, repetition_penalty=1.2, custom_generate=door, draft_model=draft, **request), plain
    )


# ---- sampled: the library's tokens


@pytest.mark.parametrize(
    "options, sampling",
    [
        ({"top_k": 0}, SamplingConfig(1.0, seed=5)),
        ({"temperature": 0.8, "top_k": 0}, SamplingConfig(0.8, seed=5)),
        ({"temperature": 1.3, "top_k": 7, "top_p": 0.9}, SamplingConfig(1.3, 0.9, 7, seed=5)),
    ],
    ids=str,
)
def test_sampled_tokens_are_the_librarys(options, sampling, pair, door, make_prompt, make_engine, make_model):
    target, draft = pair
    ids = make_prompt(60)
    out = target.generate(
        ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=NEW, pad_token_id=0, do_sample=True,
        custom_generate=door, draft_model=draft, seed=5, **options,
    )  # fmt: skip
    expected = make_engine(make_model("gqa")).autoregressive(ids, NEW, sampling=sampling).token_ids
    assert out[0, 60:].tolist() == expected


def test_sampling_behind_other_rules_follows_their_distribution(pair, door, make_prompt):
    """min-p and a penalty beside a temperature: only tokens they allow, the likeliest most often, anew each call."""
    target, draft = pair
    ids = make_prompt(30)[None]
    request = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "pad_token_id": 0, "do_sample": True}
    rules = {"temperature": 2.0, "min_p": 0.3, "repetition_penalty": 1.3}
    detail = target.generate(ids, output_scores=True, return_dict_in_generate=True, **request, **rules)
    law = detail.scores[0][0].softmax(-1)
    torch.manual_seed(3)
    ours = {"custom_generate": door, "draft_model": draft, "specextend_config": CONFIG}
    drawn = torch.tensor([int(target.generate(ids, **request, **rules, **ours)[0, 30]) for _ in range(150)])
    counts = torch.bincount(drawn, minlength=len(law)) / len(drawn)
    assert int((law > 0).sum()) > 1 and counts[law == 0].sum() == 0
    assert (counts - law).abs().max() < 0.15


def test_torchs_seed_decides_where_none_is_given(pair, door, make_prompt):
    target, draft = pair
    ids = make_prompt(30)[None]
    request = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0, "do_sample": True}

    def draw() -> list[int]:
        return target.generate(ids, custom_generate=door, draft_model=draft, **request)[0].tolist()

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert draw() == first != second


# ---- what comes back, and how


def test_output_object_holds_plain_generates_scores_and_logits(pair, door, make_prompt):
    target, draft = pair
    ids = make_prompt(60)[None]
    request = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False,
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.3,
    }  # fmt: skip
    plain = target.generate(ids, **request)
    ours = target.generate(ids, custom_generate=door, draft_model=draft, **request)
    assert torch.equal(ours.sequences, plain.sequences) and len(ours.scores) == len(ours.logits) == NEW
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(ours[name]), torch.cat(plain[name]), rtol=1e-4, atol=1e-4)
    assert not ours.scores[0].is_inference() and not ours.sequences.is_inference()
    bare = target.generate(ids, custom_generate=door, draft_model=draft, **request | {"output_scores": False})
    assert bare.scores is None and torch.equal(bare.sequences, plain.sequences)


def test_scores_of_sampling_are_those_it_drew_from(pair, door, make_prompt):
    target, draft = pair
    ids = make_prompt(60)[None]
    request = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "pad_token_id": 0, "do_sample": True}
    ours = target.generate(
        ids, custom_generate=door, draft_model=draft, temperature=0.7, top_k=5, seed=2, return_dict_in_generate=True,
        output_scores=True, **request,
    )  # fmt: skip
    plain = target.generate(ids, custom_generate=door, draft_model=draft, temperature=0.7, top_k=5, seed=2, **request)
    assert torch.equal(ours.sequences, plain)
    for token, scores in zip(ours.sequences[0, 60:], ours.scores, strict=True):
        assert int(scores.isfinite().sum()) == 5 and scores[0, token].isfinite()


def test_streamer_gets_what_plain_generate_gives_it(pair, door, make_prompt):
    class Recorder(BaseStreamer):
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard.append(value.tolist())

        def end(self):
            self.heard.append("end")

    target, draft = pair
    ids, heard = make_prompt(20)[None], []
    for options in ({}, {"custom_generate": door, "draft_model": draft}):
        recorder = Recorder()
        target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0, do_sample=False,
            streamer=recorder, **options,
        )  # fmt: skip
        heard.append(recorder.heard)
    assert heard[0] == heard[1] and len(heard[0]) == NEW + 2


# ---- caches in and out


def turns(target, count: int, make_prompt, **options) -> tuple[list[list[int]], DynamicCache]:
    """A conversation of `count` turns over one cache: the text after each, and the cache."""
    cache, ids, texts = DynamicCache(config=target.config), make_prompt(40)[None], []
    for turn in range(count):
        ids = target.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=9 + turn, pad_token_id=0,
            do_sample=False, **options,
        )  # fmt: skip
        texts.append(ids[0].tolist())
        ids = torch.cat((ids, make_prompt(5 + turn, seed=turn)[None]), dim=1)
    return texts, cache


@pytest.mark.parametrize("kind", ["gqa", "qwen3", "llama3"])
def test_a_cache_is_gone_on_with_and_comes_back_as_plain_generates(
    kind, door, make_model, perturbed, hf_twin, make_prompt
):
    target, draft = hf_twin(make_model(kind)), hf_twin(perturbed(make_model(kind), 0.05))
    texts, cache = turns(target, 4, make_prompt)
    ours, own = turns(target, 4, make_prompt, custom_generate=door, assistant_model=draft)
    assert ours == texts and own.get_seq_length() == cache.get_seq_length() == len(texts[-1]) - 1
    for layer, plain in zip(own.layers, cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, plain.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, plain.values, rtol=1e-4, atol=1e-4)
    assert not own.layers[0].keys.is_inference()


def test_a_cache_is_not_read_again_and_is_believed(pair, door, make_prompt):
    target, draft = pair
    ids, other = make_prompt(60)[None], make_prompt(60, seed=1)[None]
    engine = door._engine(target, draft, None)
    read = tokens_read(engine)
    for text in (ids, other):  # what is in the cache decides, as for plain generate, whatever the ids before say
        answers = []
        for options in ({}, {"custom_generate": door, "draft_model": draft}):
            cache = DynamicCache(config=target.config)
            target(text[:, :55], past_key_values=cache)
            request = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "pad_token_id": 0}
            answers.append(target.generate(ids, past_key_values=cache, do_sample=False, **request, **options).tolist())
        assert answers[0] == answers[1]
    assert read == [5, 5]
    plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, pad_token_id=0, do_sample=False)
    ours = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, pad_token_id=0, do_sample=False,
        custom_generate=door, draft_model=draft,
    )  # fmt: skip
    assert torch.equal(ours, plain), "another's numbers are in no later answer"


def test_the_output_object_has_a_cache_to_go_on_with(pair, door, make_prompt):
    target, draft = pair
    ids = make_prompt(30)[None]
    request = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False, "return_dict_in_generate": True}
    ours = {"custom_generate": door, "draft_model": draft}
    for changes in ({}, {"max_new_tokens": 1}, {"use_cache": False}, {"cache_implementation": "static"}):
        plain, own = (
            target.generate(ids, attention_mask=torch.ones_like(ids), **request | changes, **options)
            for options in ({}, ours)
        )
        assert torch.equal(own.sequences, plain.sequences)
        assert type(own.past_key_values) is type(plain.past_key_values)
        if plain.past_key_values is not None:
            assert own.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    first = target.generate(ids, attention_mask=torch.ones_like(ids), **request, **ours)
    longer = torch.cat((first.sequences, make_prompt(4)[None]), dim=1)
    options = {"attention_mask": torch.ones_like(longer), **request}
    again = target.generate(longer, past_key_values=first.past_key_values, **options, **ours)
    assert torch.equal(again.sequences, target.generate(longer, **options).sequences)
    assert again.past_key_values is first.past_key_values


# ---- batches and padding


@pytest.fixture
def batch(make_prompt):
    """Four rows of different lengths, padded on the left with token 3, and their mask."""
    prompts = [make_prompt(length, seed=length) for length in (25, 60, 1, 41)]
    ids = torch.stack([torch.cat((torch.full((60 - len(one),), 3), one)) for one in prompts])
    return ids, torch.stack([(torch.arange(60) >= 60 - len(one)).long() for one in prompts])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": [4, 9, 17, 33, 60, 71, 80]},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 3},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [(int(ids[-1]) * 7 + step + batch) % 97 for step in range(9)]},
        {"max_new_tokens": 1},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_rows_of_a_batch_are_plain_generates(options, pair, door, batch):
    target, draft = pair
    ids, mask = batch
    request = {"attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": 3, "do_sample": False} | options
    plain = target.generate(ids, **request)
    ours = target.generate(ids, custom_generate=door, assistant_model=draft, specextend_config=EAGER_TREE, **request)
    assert torch.equal(ours, plain)
    if "eos_token_id" in options:
        assert len({int((row[60:] != 3).sum()) for row in plain}) > 1, "rows end at different places"
    one = {name: value[:1] if name == "attention_mask" else value for name, value in request.items()}
    alone = target.generate(ids[:1], custom_generate=door, assistant_model=draft, **one)
    assert torch.equal(alone, target.generate(ids[:1], **one)), "a padded row by itself"


def test_caches_of_batches_come_and_go(pair, door, batch, make_prompt):
    target, draft = pair
    ids, mask = batch
    texts = []
    for options in ({}, {"custom_generate": door, "draft_model": draft}):
        cache, text, ones = DynamicCache(config=target.config), ids, mask
        for turn in range(3):
            request = {"max_new_tokens": 7, "pad_token_id": 3, "do_sample": False}
            text = target.generate(text, attention_mask=ones, past_key_values=cache, **request, **options)
            assert cache.get_seq_length() == text.shape[1] - 1
            more = torch.stack([make_prompt(4, seed=row + 10 * turn) for row in range(len(ids))])
            text = torch.cat((text, more), dim=1)
            ones = torch.cat((mask, torch.ones(len(ids), text.shape[1] - 60, dtype=torch.long)), dim=1)
        texts.append(text)
    assert torch.equal(*texts)


def test_several_samples_of_one_prompt_differ_and_are_counted_from_the_seed(pair, door, make_prompt):
    target, draft = pair
    ids = make_prompt(30)[None]
    request = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 0, "do_sample": True}
    ours = {"custom_generate": door, "draft_model": draft}
    three = target.generate(ids, num_return_sequences=3, seed=7, **request, **ours)
    alone = [target.generate(ids, seed=7 + row, **request, **ours)[0].tolist() for row in range(3)]
    assert three.tolist() == alone and len({tuple(row) for row in alone}) == 3


# ---- EAGLE heads


@pytest.mark.parametrize("kind", ["eagle1", "eagle3"])
def test_heads_draft_as_objects_and_by_their_path(kind, plain_bundled, bundled_models, door):
    path = Path(specextend.PRESETS["bundled"].target).parent / kind
    inputs = bundled_models.tokenizer(PROMPT * 4, return_tensors="pt")
    request = {"max_new_tokens": 24, "do_sample": False, "custom_generate": door}
    plain = plain_bundled.generate(**inputs, max_new_tokens=24, do_sample=False)
    head = load_head(path, plain_bundled)
    for draft in ({"draft_model": str(path)}, {"draft_model": head}, {"assistant_model": head}):
        assert torch.equal(plain_bundled.generate(**inputs, **request, **draft), plain)
    engine = door._engine(plain_bundled, head, None)
    result = engine.generate(inputs.input_ids[0], 24)
    assert engine.reads_hidden_states and result.accepted_per_round > 0.5
    assert door._engine(plain_bundled, head, None) is engine


def test_heads_go_on_with_a_cache_of_the_same_text_alone(plain_bundled, bundled_models, door):
    path = Path(specextend.PRESETS["bundled"].target).parent / "eagle3"
    ids = bundled_models.tokenizer(PROMPT * 10, return_tensors="pt").input_ids
    ours = {"custom_generate": door, "assistant_model": load_head(path, plain_bundled)}
    request = {"max_new_tokens": 16, "do_sample": False}
    texts = []
    for options in ({}, ours):
        cache, text = DynamicCache(config=plain_bundled.config), ids
        for _ in range(3):
            text = plain_bundled.generate(text, past_key_values=cache, **request, **options)
            text = torch.cat((text, ids[:, :3]), dim=1)
        texts.append(text)
    assert torch.equal(*texts)
    strange = []
    for options in ({}, ours):  # the head knows these tokens, so that nothing of the cache is read again
        cache = DynamicCache(config=plain_bundled.config)
        plain_bundled(ids.flip(1)[:, :20], past_key_values=cache)
        strange.append(plain_bundled.generate(ids, past_key_values=cache, **request, **options))
    assert torch.equal(*strange)
    door.close()
    cache = DynamicCache(config=plain_bundled.config)
    plain_bundled(ids.flip(1)[:, :20], past_key_values=cache)
    with pytest.raises(ConfigError, match="past_key_values of another text"):
        plain_bundled.generate(ids, past_key_values=cache, **request, **ours)


def test_a_head_of_another_target_is_refused_in_a_line(pair, plain_bundled, door, make_prompt):
    path = Path(specextend.PRESETS["bundled"].target).parent / "eagle3"
    request = {"max_new_tokens": 4, "pad_token_id": 0, "custom_generate": door}
    for draft in (str(path), load_head(path, plain_bundled)):
        with pytest.raises(ModelError, match="head") as raised:
            pair[0].generate(make_prompt(9)[None], draft_model=draft, **request)
        assert "\n" not in str(raised.value)


# ---- the models stay as they are, and the engine with them


def state_of(model) -> dict:
    return {
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "config": model.config.to_dict(),
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "weights": [(name, weight.data_ptr(), weight.requires_grad) for name, weight in model.named_parameters()],
        "training": model.training,
    }


def test_models_are_left_as_they_were(make_model, perturbed, hf_twin, door, make_prompt):
    target, draft = hf_twin(make_model("dynamic")).train().requires_grad_(True), hf_twin(make_model("dynamic"))
    before = copy.deepcopy([state_of(target), state_of(draft)])
    values = [weight.clone() for weight in target.parameters()]
    ids = make_prompt(50)[None]
    request = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "pad_token_id": 0}
    target.generate(ids, custom_generate=door, draft_model=draft, **request)
    assert [state_of(target), state_of(draft)] == before
    assert all(torch.equal(*both) for both in zip(values, target.parameters(), strict=True))


def test_engine_is_kept_until_a_weight_draft_or_setting_changes(make_model, perturbed, hf_twin, door, make_prompt):
    target, draft = hf_twin(make_model("gqa")), hf_twin(perturbed(make_model("gqa"), 0.05))
    first = door._engine(target, draft, None)
    assert door._engine(target, draft, None) is first
    assert door._engine(target, draft, CONFIG) is not first
    first = door._engine(target, draft, None)
    assert door._engine(target, hf_twin(draft), None) is not first
    first = door._engine(target, draft, None)
    draft.lm_head.weight.data[0, 0] += 1e-3  # as merging an adapter does, unnoticed by version counters
    assert door._engine(target, draft, None) is not first


def test_weights_changed_in_place_change_the_answer_as_they_should(make_model, hf_twin, door, make_prompt):
    target, ids = hf_twin(make_model("gqa")), make_prompt(40)[None]
    request = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
    before = target.generate(ids, custom_generate=door, draft_model=hf_twin(target), **request)
    for weight in target.parameters():
        weight.data.mul_(1.3)
    after = target.generate(ids, **request)
    assert not torch.equal(after, before)
    assert torch.equal(target.generate(ids, custom_generate=door, draft_model=hf_twin(target), **request), after)


def test_engine_goes_with_its_model_or_by_close(make_model, hf_twin, door, make_prompt):
    target, draft = hf_twin(make_model("gqa")), hf_twin(make_model("gqa"))
    engines = [weakref.ref(door._engine(target, draft, None))]
    door.close()
    engines.append(weakref.ref(door._engine(target, draft, None)))
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None and [engine() for engine in engines] == [None, None]


def test_weights_moved_in_the_twin_stay_where_they_are_in_the_model(make_model, hf_twin):
    target = hf_twin(make_model("tied")).double()  # not packed, as on a GPU
    before, twin = state_of(target), make_twin(target)
    assert [weight.data_ptr() for weight in twin.parameters()] == [weight.data_ptr() for weight in target.parameters()]
    for weight in twin.parameters():  # as captured rounds do when they join what reads the same input
        weight.data = weight.data.clone()
    assert state_of(target) == before


# ---- requests it does not take


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam sample"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
        ({"draft_model": None}, "draft_model is None"),
        ({"draft_model": 7}, "draft_model is 7"),
        ({"draft_model": torch.nn.Linear(1, 1)}, "draft_model is Linear"),
        ({"specextend_config": {}}, "specextend_config is {}"),
        ({"specextend_config": "standard"}, "specextend_config is 'standard'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": "1"}, "seed is '1'"),
        ({"seed": -1, "do_sample": True}, "seed is -1"),
        ({"position_ids": torch.arange(5, 25)[None]}, "position_ids other than 0, 1, 2"),
        ({"attention_mask": torch.ones(1, 7)}, r"attention_mask of \[1, 7\] beside input_ids of \[1, 20\]"),
        ({"past_key_values": StaticCache}, "a StaticCache as past_key_values: give a DynamicCache"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"num_items_in_batch": 1}, "num_items_in_batch"),
    ],
    ids=str,
)
def test_other_kinds_of_generation_are_refused_in_a_line(options, message, pair, door, make_prompt):
    target, draft = pair
    ids = make_prompt(20)[None]
    request = {"max_new_tokens": 4, "pad_token_id": 0, "draft_model": draft, "attention_mask": torch.ones_like(ids)}
    if options.get("past_key_values") is StaticCache:
        options = {"past_key_values": StaticCache(config=target.config, max_cache_len=32)}
    with pytest.raises(ConfigError, match=message) as raised:
        target.generate(ids, custom_generate=door, **request | options)
    assert "\n" not in str(raised.value)


def test_autocast_is_refused_and_usual_positions_are_not(pair, door, make_prompt):
    target, draft = pair
    ids = make_prompt(20)[None]
    request = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    request["position_ids"] = torch.arange(20)[None]
    plain = target.generate(ids, **request)
    assert torch.equal(target.generate(ids, custom_generate=door, draft_model=draft, **request), plain)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="does not take autocast"):
        target.generate(ids, custom_generate=door, draft_model=draft, **request)


def test_what_rows_or_caches_cannot_have_is_refused_in_a_line(pair, door, make_prompt):
    class Own(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    target, draft = pair
    ids = make_prompt(20)[None]
    two, ones = ids.repeat(2, 1), torch.ones(2, 20)
    cache = DynamicCache(config=target.config)
    target(ids, past_key_values=cache)
    detail = {"output_scores": True, "return_dict_in_generate": True}
    for options, message in (
        ({"inputs": ids, "attention_mask": (torch.arange(20) < 18).long()[None]}, "zeros behind ones: pad on the left"),
        ({"inputs": two, "attention_mask": ones * torch.tensor([[1], [0]])}, "a row of padding alone"),
        ({"inputs": two, "attention_mask": ones, "logits_processor": [Own()]}, "a Own with a batch of 2 rows"),
        ({"inputs": two, "attention_mask": ones, "stopping_criteria": [Every(3)]}, "a Every with a batch"),
        ({"inputs": two, "attention_mask": ones, "max_time": 9.0}, "stopping criteria without eos_token_id"),
        ({"inputs": two, "attention_mask": ones, "streamer": BaseStreamer}, "a streamer with a batch"),
        ({"inputs": two, "attention_mask": ones} | detail, "output_scores and output_logits with a batch"),
        ({"inputs": ids, "past_key_values": cache}, "past_key_values of 20 tokens with input_ids of 20"),
        ({"inputs": two, "attention_mask": ones, "past_key_values": cache}, "past_key_values of 1 rows beside"),
        ({"inputs": ids, "assistant_model": draft}, "both name a draft"),
    ):
        if options.get("streamer") is BaseStreamer:
            options["streamer"] = Silent()
        with pytest.raises(ConfigError, match=message) as raised:
            target.generate(custom_generate=door, draft_model=draft, max_new_tokens=4, pad_token_id=0, **options)
        assert "\n" not in str(raised.value)


class Silent(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


def test_models_it_cannot_run_are_refused(pair, door, make_prompt, make_model, hf_twin):
    target, draft = pair
    stranger = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2))
    request = {"max_new_tokens": 4, "pad_token_id": 0, "custom_generate": door}
    ids = make_prompt(20)[None]
    with pytest.raises(ModelError, match="the model is a GPT2LMHeadModel; supported are LlamaForCausalLM"):
        stranger.generate(ids, draft_model=draft, **request)
    with pytest.raises(ModelError, match="the draft is a GPT2LMHeadModel"):
        target.generate(ids, draft_model=stranger, **request)
    small = hf_twin(make_model("gqa", vocab_size=50))
    with pytest.raises(ModelError, match="draft knows 50 tokens, the model 97"):
        target.generate(ids, draft_model=small, **request)


# ---- the bundled pair, with text


@pytest.fixture(scope="module")
def plain_bundled():
    return AutoModelForCausalLM.from_pretrained(specextend.PRESETS["bundled"].target, dtype=torch.float32)


def test_bundled_pair_by_name_with_streamed_text_and_stop_strings(plain_bundled, bundled_models, capsys):
    tokenizer = bundled_models.tokenizer
    inputs = tokenizer(PROMPT, return_tensors="pt")
    request = {"max_new_tokens": 40, "repetition_penalty": 1.1, "do_sample": False}
    ours = {"custom_generate": specextend.custom_generate, "draft_model": "bundled"}
    plain = plain_bundled.generate(**inputs, **request)
    text = tokenizer.decode(plain[0, inputs.input_ids.shape[1] :])
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    assert torch.equal(plain_bundled.generate(**inputs, **request, **ours, streamer=streamer), plain)
    assert capsys.readouterr().out.strip() == text.strip()

    stop = text[30:36]
    stopped = plain_bundled.generate(**inputs, **request, stop_strings=[stop], tokenizer=tokenizer)
    assert stopped.shape[1] < plain.shape[1]
    assert torch.equal(
        plain_bundled.generate(**inputs, **request, **ours, stop_strings=[stop], tokenizer=tokenizer), stopped
    )
    configured = GenerationConfig(**request, stop_strings=[stop])
    for options in ({}, ours):
        out = plain_bundled.generate(**inputs, generation_config=configured, tokenizer=tokenizer, **options)
        assert torch.equal(out, stopped)
    for options in ({}, ours):
        with pytest.raises(ValueError, match="could not locate a tokenizer"):
            plain_bundled.generate(**inputs, **request, **options, stop_strings=[stop])


def test_token_healing_is_plain_generates(plain_bundled, bundled_models):
    tokenizer = copy.deepcopy(bundled_models.tokenizer)
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    inputs = tokenizer("The king said th", return_tensors="pt")
    request = {"max_new_tokens": 12, "do_sample": False, "token_healing": True, "tokenizer": tokenizer}
    plain = plain_bundled.generate(**inputs, **request)
    ours = {"custom_generate": specextend.custom_generate, "draft_model": "bundled"}
    assert torch.equal(plain_bundled.generate(**inputs, **request, **ours), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_rounds_are_captured_and_the_model_stays_as_it_was(bundled_models):
    models = load_models("bundled", dtype="float16", device="cuda")
    target = AutoModelForCausalLM.from_pretrained(specextend.PRESETS["bundled"].target, dtype=torch.float16).cuda()
    before, door = state_of(target), CustomGenerate()
    inputs = bundled_models.tokenizer(PROMPT, return_tensors="pt").to("cuda")
    request = {"max_new_tokens": 40, "custom_generate": door, "draft_model": "bundled"}
    expected = SpecExtend(models).generate(PROMPT, 40).token_ids
    for _ in range(3):  # run, captured, replayed
        ids = target.generate(**inputs, do_sample=False, **request)
        assert ids[0, inputs.input_ids.shape[1] :].tolist() == expected
    assert state_of(target) == before
    penalized = {"do_sample": False, "repetition_penalty": 1.3}
    ids = target.generate(**inputs, **penalized, **request)
    assert torch.equal(target.generate(**inputs, **penalized, **request), ids)
    assert ids[0, inputs.input_ids.shape[1] :].tolist() != expected
