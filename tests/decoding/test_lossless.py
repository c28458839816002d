"""The output is the target's: autoregressive decoding equals transformers' generate, every setting equals both.

All of it in fp32, token for token, with drafts that are never, always and sometimes right.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.errors import CapacityError, ConfigError, InputError

KINDS = ("mha", "gqa", "tied", "qwen2", "qwen3", "mistral", "linear", "llama3", "yarn", "dynamic")
LENGTHS = (3000, 300, 33, 32, 31, 2, 1)
NEW = 24  # tokens to generate
TREE = TreeConfig(nodes=12, max_depth=4, threshold=0.1)
RETRIEVAL = RetrievalConfig(chunk_size=8, top_k=6, every_n_steps=2)
PARTS = {"prefill_block": 48, "tree": TREE, "retrieval": RETRIEVAL}
COMBINATIONS = [
    SpecExtendConfig(flash, hybrid, cache, draft_window=window, **PARTS)
    for flash, hybrid, cache, window in itertools.product(
        (False, True), (False, True), ("full", "streaming", "retrieval"), (0, 32)
    )
    if flash or not window  # the window belongs to the flash prefill
]
STANDARD = SpecExtendConfig.standard(**PARTS)
SPECEXTEND = SpecExtendConfig.specextend(draft_window=32, **PARTS)
FLASH = replace(SPECEXTEND, draft_cache="full", draft_window=0)
STREAMING = replace(SPECEXTEND, draft_cache="streaming", flash_prefill=False)
NAMED = (STANDARD, SPECEXTEND, FLASH, STREAMING)
SAMPLINGS = [
    SamplingConfig(temperature=0.8, seed=3),
    SamplingConfig(temperature=1.5, top_p=0.9, seed=4),
    SamplingConfig(temperature=1.0, top_k=5, seed=5),
    SamplingConfig(temperature=0.7, top_p=0.8, top_k=20, seed=6),
]


def name(config: SpecExtendConfig) -> str:
    prefill = f"flash{config.draft_window}" if config.flash_prefill else "dense"
    return f"{prefill}-{'hybrid' if config.hybrid_tree_attention else 'dense'}-{config.draft_cache}"


# ---- autoregressive decoding against transformers


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_autoregressive_equals_hugging_face_generate(kind, length, make_model, make_engine, make_prompt, hf_generate):
    model, prompt = make_model(kind), make_prompt(length)
    ours = make_engine(model, config=SpecExtendConfig(prefill_block=256)).autoregressive(prompt, NEW)
    assert ours.token_ids == hf_generate(model, prompt, NEW)


@pytest.mark.parametrize("kind", ["mha", "gqa", "qwen3"])
def test_autoregressive_equals_hugging_face_generate_with_eager_attention(
    kind, make_model, make_engine, make_prompt, hf_generate
):
    model, prompt = make_model(kind, seed=7), make_prompt(200)
    assert make_engine(model).autoregressive(prompt, 60).token_ids == hf_generate(model, prompt, 60, "eager")


def test_dynamic_rope_prompts_in_descending_length_equal_hugging_face(
    make_model, make_engine, make_prompt, hf_generate
):
    model = make_model("dynamic")
    engine = make_engine(model, model, SpecExtendConfig.specextend(tree=TREE, retrieval=RETRIEVAL))
    for length in (300, 100, 60, 40, 10):  # 60 + 24 passes max_position_embeddings while decoding
        prompt = make_prompt(length)
        expected = hf_generate(model, prompt, NEW)
        assert engine.generate(prompt, NEW).token_ids == expected
        assert engine.autoregressive(prompt, NEW).token_ids == expected


def test_dynamic_rope_really_changes_what_a_long_prompt_gives(make_model, hf_generate, make_prompt):
    # guards the tests above: with frequencies that do not change, the output differs
    model, prompt = make_model("dynamic"), make_prompt(300)
    frozen = make_model("dynamic", max_position_embeddings=8192)
    frozen.load_state_dict(model.state_dict())
    assert hf_generate(model, prompt, NEW) != hf_generate(frozen, prompt, NEW)


# ---- speculative decoding against autoregressive decoding


@pytest.mark.parametrize("config", COMBINATIONS, ids=name)
def test_every_setting_equals_autoregressive(config, make_model, perturbed, make_engine, make_prompt):
    target = make_model("gqa")
    engine = make_engine(target, perturbed(target, 0.05), config)
    for length in LENGTHS[config not in NAMED :]:  # descending, through one engine
        prompt = make_prompt(length, seed=length)
        assert engine.generate(prompt, NEW).token_ids == engine.autoregressive(prompt, NEW).token_ids


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("config", NAMED, ids=name)
def test_every_setting_samples_what_autoregressive_samples(
    config, sampling, make_model, perturbed, make_engine, make_prompt
):
    target = make_model("gqa")
    engine = make_engine(target, perturbed(target, 0.05), config)
    for length in (300, 33, 1):
        prompt = make_prompt(length, seed=length)
        expected = engine.autoregressive(prompt, NEW, sampling=sampling)
        assert engine.generate(prompt, NEW, sampling=sampling).token_ids == expected.token_ids
    assert expected.token_ids != engine.autoregressive(prompt, NEW).token_ids, "sampling did as greedy decoding does"
    other = engine.generate(prompt, NEW, sampling=replace(sampling, seed=99))
    assert other.token_ids != expected.token_ids, "the seed does not matter"


@pytest.mark.parametrize("setting", ["standard", "specextend"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_equals_autoregressive_greedy_and_sampled(
    kind, setting, make_model, perturbed, make_engine, make_prompt
):
    target = make_model(kind)
    config = getattr(SpecExtendConfig, setting)(tree=TREE, retrieval=RETRIEVAL, prefill_block=64, draft_window=32)
    engine = make_engine(target, perturbed(target, 0.05), config)
    for length, sampling in itertools.product((300, 40, 1), (SamplingConfig(), SAMPLINGS[0])):
        prompt = make_prompt(length, seed=length)
        expected = engine.autoregressive(prompt, NEW, sampling=sampling)
        assert engine.generate(prompt, NEW, sampling=sampling).token_ids == expected.token_ids


def test_draft_of_another_family_and_size_keeps_the_output(make_model, make_engine, make_prompt):
    target, draft = make_model("gqa"), make_model("qwen3", seed=5, hidden_size=32, num_hidden_layers=1)
    engine = make_engine(target, draft, SpecExtendConfig.specextend(tree=TREE, retrieval=RETRIEVAL))
    for length in (300, 33, 1):
        prompt = make_prompt(length)
        assert engine.generate(prompt, NEW).token_ids == engine.autoregressive(prompt, NEW).token_ids


@pytest.mark.parametrize("config", [STANDARD, FLASH], ids=name)
def test_draft_that_is_never_right_costs_nothing_but_time(config, make_model, opposed, make_engine, make_prompt):
    target = make_model("gqa")
    engine = make_engine(target, opposed(target), config)
    for length in (300, 33, 1):
        prompt = make_prompt(length)
        result = engine.generate(prompt, NEW)
        assert result.token_ids == engine.autoregressive(prompt, NEW).token_ids
        assert result.accepted_per_round == 0 and len(result.rounds) == NEW - 1


@pytest.mark.parametrize("floor", [0.02, 0.3, 0.99])
def test_trees_of_a_few_nodes_or_the_root_alone_keep_the_output(floor, make_model, perturbed, make_engine, make_prompt):
    target, prompt = make_model("gqa"), make_prompt(120)
    config = SpecExtendConfig.specextend(tree=TreeConfig(12, 4, 0, floor), retrieval=RetrievalConfig(8, 4, 2))
    engine = make_engine(target, perturbed(target, 0.3), config)
    result = engine.generate(prompt, 60)
    assert result.token_ids == engine.autoregressive(prompt, 60).token_ids
    assert floor < 0.9 or any(one.drafted == 0 for one in result.rounds)


@pytest.mark.parametrize("depth", [1, 3, 8])
@pytest.mark.parametrize("config", [STANDARD, FLASH], ids=name)
def test_draft_that_is_the_target_is_always_right(config, depth, make_model, perturbed, make_engine, make_prompt):
    target = make_model("gqa")
    sharp = perturbed(target, 0)
    sharp.lm_head.weight.mul_(8)  # so that the tree is the greedy chain
    engine = make_engine(target, sharp, replace(config, tree=TreeConfig(depth * 8, depth, 0)))
    for length in (300, 33, 1):
        prompt = make_prompt(length)
        result = engine.generate(prompt, 1 + 4 * (depth + 1))
        assert result.token_ids == engine.autoregressive(prompt, 1 + 4 * (depth + 1)).token_ids
        assert [one.accepted for one in result.rounds] == [depth] * 4


def test_prompt_does_not_depend_on_the_prompts_before_it(make_model, perturbed, make_engine, make_prompt):
    target = make_model("gqa")
    draft = perturbed(target, 0.02)
    for config in NAMED:
        used = make_engine(target, draft, config)
        for length in (700, 300, 90, 20, 1):
            prompt = make_prompt(length, seed=length)
            fresh = make_engine(target, draft, config).generate(prompt, NEW)
            again = used.generate(prompt, NEW)
            assert again.token_ids == fresh.token_ids
            assert [(r.tokens, r.drafted, r.accepted) for r in again.rounds] == [
                (r.tokens, r.drafted, r.accepted) for r in fresh.rounds
            ]


@settings(max_examples=60)
@given(
    nodes=st.integers(1, 60),
    max_depth=st.integers(1, 8),
    threshold=st.sampled_from([0.0, 0.05, 0.7, 3.0]),
    chunk_size=st.integers(1, 40),
    extra_chunks=st.integers(0, 20),
    every_n_steps=st.integers(1, 5),
    sink=st.integers(0, 3),
    recent=st.integers(1, 3),
    cache=st.sampled_from(["full", "streaming", "retrieval"]),
    flash=st.booleans(),
    window=st.integers(0, 50),
    block=st.integers(1, 200),
    length=st.integers(1, 150),
    temperature=st.sampled_from([0.0, 0.0, 0.9]),
)
@example(1, 1, 0.0, 1, 0, 1, 0, 1, "retrieval", True, 1, 1, 3, 0.0)  # a working cache of a single token
@example(60, 8, 0.0, 40, 20, 5, 3, 3, "retrieval", True, 50, 200, 1, 0.9)  # far more room than context
def test_any_setting_equals_autoregressive(
    make_model, perturbed, make_engine, make_prompt,
    nodes, max_depth, threshold, chunk_size, extra_chunks, every_n_steps, sink, recent,
    cache, flash, window, block, length, temperature,
):  # fmt: skip
    target = make_model("gqa")
    config = SpecExtendConfig(
        flash_prefill=flash,
        hybrid_tree_attention=flash,
        draft_cache=cache,
        prefill_block=block,
        draft_window=window,
        tree=TreeConfig(nodes, max_depth, threshold),
        retrieval=RetrievalConfig(chunk_size, sink + recent + extra_chunks, every_n_steps, sink, recent),
    )
    engine = make_engine(target, make_model("gqa", seed=1, num_hidden_layers=1), config)
    close = make_engine(target, perturbed(target, 0.02), config)
    prompt, sampling = make_prompt(length, seed=length), SamplingConfig(temperature, seed=length)
    expected = engine.autoregressive(prompt, 14, sampling=sampling).token_ids
    assert engine.generate(prompt, 14, sampling=sampling).token_ids == expected
    result = close.generate(prompt, 14, sampling=sampling)
    assert result.token_ids == expected
    assert all(1 <= one.drafted <= nodes and one.accepted <= max_depth for one in result.rounds)


# ---- where the output ends


@pytest.fixture(scope="module")
def keen(make_model, perturbed):
    """A target and a draft that is nearly always right, so that rounds emit several tokens."""
    target = make_model("gqa")
    return target, perturbed(target, 0.005)


EAGER = SpecExtendConfig.standard(tree=TreeConfig(nodes=40, max_depth=6, threshold=0))


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("config", [EAGER, SPECEXTEND], ids=name)
def test_output_has_exactly_max_new_tokens(config, new_tokens, keen, make_engine, make_prompt):
    engine, prompt = make_engine(*keen, config), make_prompt(50)
    result, expected = engine.generate(prompt, new_tokens), engine.autoregressive(prompt, new_tokens)
    assert len(result.token_ids) == result.new_tokens == new_tokens
    assert result.token_ids == expected.token_ids
    assert result.finish_reason == expected.finish_reason == "length"
    assert sum(len(one.tokens) for one in result.rounds) == new_tokens - 1


def test_output_ends_at_the_first_of_several_eos_ids_even_inside_an_accepted_path(keen, make_engine, make_prompt):
    prompt = make_prompt(50)
    free = make_engine(*keen, EAGER)
    tokens = free.autoregressive(prompt, 40).token_ids
    firsts = [i for i in range(40) if tokens[i] not in tokens[:i]]
    inside = 0
    for index in firsts:
        later = tokens[min(index + 5, 39)]
        eos = (tokens[index], later) if later not in tokens[:index] else (tokens[index],)
        engine = make_engine(*keen, EAGER, eos=(*eos, 96 if 96 not in tokens else tokens[index]))
        for result in (engine.generate(prompt, 40), engine.autoregressive(prompt, 40)):
            assert result.token_ids == tokens[: index + 1]
            assert result.finish_reason == "eos"
            assert [tokens[0], *(t for r in result.rounds for t in r.tokens)] == result.token_ids
        rounds = engine.generate(prompt, 40).rounds
        inside += bool(rounds) and len(rounds[-1].tokens) <= rounds[-1].accepted
    assert inside >= 5, "no EOS fell inside an accepted path: this test has shown nothing"


def test_eos_of_the_prompt_does_not_end_the_output(keen, make_engine, make_prompt):
    prompt = make_prompt(50)
    tokens = make_engine(*keen, EAGER).autoregressive(prompt, 10).token_ids
    absent = next(t for t in prompt.tolist() if t not in tokens)
    assert make_engine(*keen, EAGER, eos=(absent,)).generate(prompt, 10).token_ids == tokens


@pytest.mark.parametrize("method", ["generate", "autoregressive"])
def test_stop_string_ends_the_output_with_the_token_that_completes_it(method, keen, make_engine, make_prompt):
    engine, prompt = make_engine(*keen, EAGER), make_prompt(50)
    whole = engine.autoregressive(prompt, 40)
    # two letters per token: even starts lie on token borders, odd ones span tokens
    for start, length in ((0, 2), (1, 2), (7, 2), (8, 2), (21, 3), (30, 5), (41, 9), (78, 2)):
        stop = whole.text[start : start + length]
        begins = whole.text.find(stop)
        result = getattr(engine, method)(prompt, 40, stop=["~never~", stop])
        assert result.text == whole.text[:begins]
        assert result.token_ids == whole.token_ids[: (begins + length + 1) // 2]
        assert result.finish_reason == "stop"


def test_earliest_of_several_stop_strings_cuts_the_text(keen, make_engine, make_prompt):
    engine, prompt = make_engine(*keen, EAGER), make_prompt(50)
    text = engine.autoregressive(prompt, 40).text
    late, early = text[20:24], text[11:14]
    assert text.find(early) < text.find(late)
    assert engine.generate(prompt, 40, stop=[late, early]).text == text[: text.find(early)]
    long, short = text[19:24], text[21:24]  # completed by one token
    assert text.find(short) == 21
    assert engine.generate(prompt, 40, stop=[short, long]).text == text[:19]
    assert "".join(engine.stream(prompt, 40, stop=[short, long])) == text[:19]


def test_stop_string_that_never_comes_changes_nothing(keen, make_engine, make_prompt):
    engine, prompt = make_engine(*keen, EAGER), make_prompt(50)
    result = engine.generate(prompt, 20, stop=["~"])
    assert result.token_ids == engine.autoregressive(prompt, 20).token_ids and result.finish_reason == "length"


# ---- watching and streaming


@pytest.mark.parametrize("method", ["generate", "autoregressive"])
def test_on_round_sees_every_token_once(method, keen, make_engine, make_prompt):
    engine, prompt = make_engine(*keen, EAGER), make_prompt(50)
    seen, rounds = [], []

    def watch(output, round_):
        new = output.token_ids[len(seen) :]
        assert (round_ is None) == (not seen), "the prefill is told once, first"
        assert new == (round_.tokens if round_ else output.token_ids[:1])
        seen.extend(new)
        rounds.append(round_)

    result = getattr(engine, method)(prompt, 30, on_round=watch)
    assert seen == result.token_ids
    assert rounds == [None, *result.rounds]


def test_rounds_record_drafted_accepted_and_seconds_of_every_stage(keen, make_engine, make_prompt):
    config = SpecExtendConfig.specextend(tree=TreeConfig(10, 3, 0), retrieval=RETRIEVAL)
    result = make_engine(*keen, config).generate(make_prompt(200), 40)
    for index, one in enumerate(result.rounds):
        expected = {"draft", "verify", "accept", "host"} | (
            {"retrieve"} if index % RETRIEVAL.every_n_steps == 0 else set()
        )
        assert set(one.seconds) == expected and all(seconds >= 0 for seconds in one.seconds.values())
        assert one.drafted == 10
        assert len(one.tokens) == one.accepted + 1 or one is result.rounds[-1]
    assert set(result.prefill_seconds) == {"target", "draft"}
    assert result.tokens_per_round == pytest.approx(39 / len(result.rounds))
    assert result.accepted_per_round == pytest.approx(sum(r.accepted for r in result.rounds) / len(result.rounds))
    assert result.total_s == pytest.approx(result.ttft_s + sum(result.stage_seconds().values()))


@pytest.mark.parametrize("stop", [(), ("aj", "hb")], ids=["free", "stop"])
def test_streamed_pieces_add_up_to_the_text(stop, keen, make_engine, make_prompt):
    engine = make_engine(*keen, EAGER)
    for seed in range(6):
        prompt = make_prompt(50, seed=seed)
        pieces = list(engine.stream(prompt, 40, stop=stop))
        assert "".join(pieces) == engine.generate(prompt, 40, stop=stop).text
        assert stop or len([piece for piece in pieces if piece]) > 3, "the text came in one piece"


def test_stream_samples_what_generate_samples(keen, make_engine, make_prompt):
    engine, prompt = make_engine(*keen, EAGER), make_prompt(50)
    text = engine.generate(prompt, 20, sampling=SAMPLINGS[1]).text
    assert "".join(engine.stream(prompt, 20, sampling=SAMPLINGS[1])) == text


@pytest.mark.parametrize("config", [EAGER, SPECEXTEND], ids=name)
def test_closing_a_stream_early_leaves_the_engine_usable(config, keen, make_engine, make_prompt):
    engine = make_engine(*keen, config)
    expected = engine.autoregressive(make_prompt(40), NEW).token_ids
    for rounds in (1, 2, 4):
        stream = engine.stream(make_prompt(300, seed=1), 100)
        for _ in range(rounds):
            next(stream)
        stream.close()
        assert engine.generate(make_prompt(40), NEW).token_ids == expected


def test_a_thread_that_would_wait_for_its_own_stream_is_told_so(keen, make_engine, make_prompt):
    engine = make_engine(*keen, EAGER)
    expected = engine.generate(make_prompt(30), 40).text
    stream = engine.stream(make_prompt(30), 40)
    begun = next(stream)
    for other in (engine.generate, engine.autoregressive, engine.with_config(STANDARD).generate):
        with pytest.raises(InputError, match="stream of these models is open in this thread"):
            other(make_prompt(20, seed=1), 5)
    assert begun + "".join(stream) == expected


def test_settings_that_share_a_cache_take_turns(keen, make_engine, make_prompt):
    engine = make_engine(*keen, SPECEXTEND)
    standard = engine.with_config(EAGER)
    for length in (300, 20, 120):
        prompt = make_prompt(length)
        expected = engine.autoregressive(prompt, NEW).token_ids
        assert engine.generate(prompt, NEW).token_ids == expected
        assert standard.generate(prompt, NEW).token_ids == expected
        assert engine.generate(prompt, NEW).token_ids == expected


# ---- requests that cannot be served


@pytest.mark.parametrize("method", ["generate", "autoregressive"])
def test_prompt_beyond_the_limit_says_what_is_allowed(method, keen, make_engine, make_prompt):
    engine = make_engine(*keen, EAGER, limit=100)
    assert len(getattr(engine, method)(make_prompt(90), 10).token_ids) == 10
    with pytest.raises(CapacityError, match=r"91 tokens and 10 more .* holds 100 positions; use at most 90"):
        getattr(engine, method)(make_prompt(91), 10)


@pytest.mark.parametrize("new_tokens", [0, -1])
def test_fewer_than_one_new_token_is_refused(new_tokens, keen, make_engine, make_prompt):
    engine = make_engine(*keen, EAGER)
    for method in (engine.generate, engine.autoregressive, lambda *a: next(engine.stream(*a))):
        with pytest.raises(ConfigError, match=f"{new_tokens} new tokens are asked for"):
            method(make_prompt(5), new_tokens)


@pytest.mark.parametrize("prompt", [torch.empty(0, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long), "", " \n"])
def test_empty_or_misshapen_prompt_is_refused(prompt, keen, make_engine):
    with pytest.raises(InputError, match="empty"):
        make_engine(*keen, EAGER).generate(prompt, 5)


def test_empty_stop_string_is_refused(keen, make_engine, make_prompt):
    with pytest.raises(ConfigError, match="stop string is empty"):
        make_engine(*keen, EAGER).generate(make_prompt(5), 5, stop=["x", ""])
