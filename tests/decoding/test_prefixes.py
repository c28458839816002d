"""Prefixes that are not read again: after any history an engine answers, and drafts, as a fresh one does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import backend_of
from histories import STEPS, assert_fresh_after, tokens_read
from hypothesis import given, settings
from hypothesis import strategies as st

import eagle.models
from specextend.config import RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.engine import SpecExtend
from specextend.errors import CapacityError, ConfigError
from specextend.methods import METHODS
from specextend.modeling.cache import KVCache
from specextend.modeling.prefixes import PrefixLimits

EAGER = [name for name in METHODS if name != "autoregressive_hf"]
CAPTURED = [name for name in EAGER if name != "triforce"]
LIMITS = PrefixLimits(copies=2, worth=4)
RETRIEVAL = RetrievalConfig(4, 3, 2)
SPECEXTEND = SpecExtendConfig.specextend(tree=TreeConfig(5, 3, 0.1), retrieval=RETRIEVAL, draft_window=8)
SAMPLINGS = st.sampled_from([SamplingConfig(), SamplingConfig(0.8, seed=5)])


def config_of(method: str, tree: TreeConfig) -> SpecExtendConfig:
    config = replace(METHODS[method].config(tree, RETRIEVAL), draft_window=8)
    return replace(config, tree=TreeConfig(3, 3)) if METHODS[method].chain else config


def anew(engine: SpecExtend) -> SpecExtend:
    """The same models and setting in an engine that has seen nothing."""
    return SpecExtend(engine.models, engine.config, prefix_reuse=False)


@pytest.fixture
def engine(make_engine, make_model, perturbed):
    target = make_model("gqa")
    return make_engine(target, perturbed(target, 0.1), SPECEXTEND, prefix_reuse=LIMITS)


# ---- any history


@settings(max_examples=60)
@given(
    steps=STEPS,
    method=st.sampled_from(EAGER),
    kind=st.sampled_from(["mha", "gqa", "llama3", "yarn"]),
    block=st.sampled_from([0, 7]),
    sampling=SAMPLINGS,
    noise=st.sampled_from([0.0, 0.1]),
)
def test_any_history_leaves_the_answer_alone(
    steps, method, kind, block, sampling, noise, make_model, perturbed, make_engine, make_prompt
):
    target = make_model(kind)
    config = replace(config_of(method, TreeConfig(5, 3, 0.1)), prefill_block=block)
    one = make_engine(target, perturbed(target, noise), config, prefix_reuse=LIMITS)
    assert_fresh_after(steps, make_prompt(50), [one], anew, 7, sampling=sampling)


@settings(max_examples=25)
@given(steps=STEPS, methods=st.tuples(*[st.sampled_from(EAGER)] * 2), sampling=SAMPLINGS)
def test_engines_over_one_cache_take_turns(steps, methods, sampling, make_model, perturbed, make_engine, make_prompt):
    target = make_model("gqa")
    configs = [config_of(method, TreeConfig(5, 3, 0.1)) for method in methods]
    first = make_engine(target, perturbed(target, 0.1), configs[0], prefix_reuse=LIMITS)
    assert_fresh_after(steps, make_prompt(50), [first, first.with_config(configs[1])], anew, 7, sampling=sampling)


@pytest.fixture(scope="module", params=["eagle1", "eagle3"])
def head_models(request):
    return eagle.models.load_models("bundled", head=request.param, dtype="float32", device="cpu")


@settings(max_examples=10)
@given(steps=STEPS, cache=st.sampled_from(["full", "retrieval"]), sampling=SAMPLINGS)
def test_any_history_leaves_the_answer_of_heads_alone(steps, cache, sampling, head_models, make_prompt):
    config = SpecExtendConfig.specextend(
        draft_cache=cache, tree=TreeConfig(8, 4, 0.2), retrieval=RetrievalConfig(8, 5, 2)
    )
    one = SpecExtend(head_models, config, prefix_reuse=LIMITS)
    standard = one.with_config(SpecExtendConfig.standard(tree=TreeConfig(8, 4, 0.2)))
    document = one.encode("The committee met in the morning, and the committee met again in the evening. " * 4)
    assert_fresh_after(steps, document, [one], anew, 12, sampling=sampling, slack=6)
    assert_fresh_after(steps, document, [one, standard], anew, 12, sampling=sampling)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="models of the tests are on the CPU")
@settings(max_examples=5)
@given(steps=STEPS, method=st.sampled_from(CAPTURED), sampling=SAMPLINGS)
def test_any_history_leaves_the_answer_of_captured_rounds_alone(
    steps, method, sampling, make_model, perturbed, make_engine, make_prompt, monkeypatch
):
    pytest.importorskip("triton")
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    config = config_of(method, TreeConfig(3, 2, 0.1))
    with monkeypatch.context() as patch:
        patch.setattr("specextend.engine.why_not_captured", lambda *_: None)
        one = make_engine(target, perturbed(target, 0.3), config, prefix_reuse=LIMITS)
    assert one.backend == "graphs"
    assert_fresh_after(steps[:3], make_prompt(20), [one], anew, 4, sampling=sampling)


# ---- what is read


def draft_reads(engine: SpecExtend) -> list[int]:
    """Grows by what the draft's prefill reads from now on."""
    cache, lengths = backend_of(engine)._drafter.cache, []

    def counted(tokens: int) -> None:
        lengths.append(tokens)
        type(cache).commit_prompt(cache, tokens)

    cache.commit_prompt = counted
    return lengths


def test_a_second_question_costs_its_own_tokens(engine, make_prompt):
    document, questions = make_prompt(200), [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    first = engine.generate(torch.cat((document, questions[0])), 9)
    assert first.cached_tokens == 0
    target, draft = tokens_read(engine), draft_reads(engine)
    second = engine.generate(torch.cat((document, questions[1])), 9)
    assert second.cached_tokens == 200 and sum(target) == sum(draft) == 2


def test_an_answer_is_read_again_by_the_draft_alone(engine, make_prompt):
    prompt = make_prompt(60)
    first = engine.generate(prompt, 9)
    target, draft = tokens_read(engine), draft_reads(engine)
    longer = torch.cat((prompt, torch.tensor([*first.token_ids, 7])))
    assert engine.generate(longer, 9).cached_tokens == 68  # the newest token was never verified
    assert sum(target) == 2 and sum(draft) == 10


def test_the_last_token_is_always_read(engine, make_prompt):
    prompt = make_prompt(40)
    answers = [engine.generate(part, 5) for part in (prompt, prompt, prompt[:30], prompt[:1])]
    assert [one.cached_tokens for one in answers] == [0, 39, 29, 0]


def test_what_is_written_over_is_copied_and_comes_back(engine, make_prompt):
    one, other = make_prompt(50, seed=1), make_prompt(60, seed=2)
    alone = [engine.generate(prompt, 5).token_ids for prompt in (one, other)]
    again = [engine.generate(prompt, 5) for prompt in (one, other, one)]
    assert [answer.cached_tokens for answer in again] == [49, 59, 49]
    assert [answer.token_ids for answer in again] == [alone[0], alone[1], alone[0]]


def test_copies_have_a_number_and_a_size(make_engine, make_model, make_prompt):
    model = make_model("gqa")

    def cached(limits: PrefixLimits) -> list[int]:
        engine = make_engine(model, model, SPECEXTEND, prefix_reuse=limits)
        for seed in range(4):
            engine.generate(make_prompt(50, seed), 3)
        assert engine.prefix_bytes <= 2 * limits.nbytes  # the target's and the draft's
        return [engine.generate(make_prompt(50, seed), 3).cached_tokens for seed in (3, 2, 1, 0)]

    assert cached(PrefixLimits(copies=3, worth=4)) == [49, 49, 49, 49]
    assert cached(PrefixLimits(copies=1, worth=4)) == [49, 49, 0, 0]
    assert cached(PrefixLimits(copies=0, worth=4)) == [49, 0, 0, 0]
    one_prompt = 2 * 2 * 2 * 16 * 4 * 52  # keys and values, layers, heads, dim, bytes, entries
    assert cached(PrefixLimits(nbytes=one_prompt, worth=4)) == [49, 49, 0, 0]
    assert cached(PrefixLimits(nbytes=one_prompt - 1, worth=4)) == [49, 0, 0, 0]
    assert cached(PrefixLimits(worth=100)) == [49, 0, 0, 0]
    with pytest.raises(ConfigError, match="worth is 0"):
        PrefixLimits(worth=0)


def test_scopes_know_nothing_of_each_other(engine, make_prompt):
    prompt = make_prompt(50)
    asked = ["ada", "ada", "bob", None, "ada", "bob"]
    answers = [engine.generate(prompt, 3, prefix_scope=scope) for scope in asked]
    assert [one.cached_tokens for one in answers] == [0, 49, 0, 0, 49, 49]
    assert len({tuple(one.token_ids) for one in answers}) == 1


def test_the_baseline_reads_everything_and_leaves_nothing(engine, make_prompt):
    prompt = make_prompt(50)
    expected = engine.generate(prompt, 9)
    assert engine.autoregressive(prompt, 9).cached_tokens == 0
    again = engine.generate(prompt, 9)  # from a copy
    assert again.cached_tokens == 49 and again.token_ids == expected.token_ids
    fresh = SpecExtend(engine.models, engine.config, prefix_reuse=LIMITS)
    fresh.autoregressive(prompt, 9)
    assert fresh.generate(prompt, 9).cached_tokens == 0


def test_a_stream_that_is_left_and_rounds_that_fail_leave_what_was_read(engine, make_prompt):
    prompt = make_prompt(50)
    pieces = engine.stream(prompt, 40)
    next(pieces), next(pieces), next(pieces)
    pieces.close()
    assert engine.generate(prompt, 9).token_ids == anew(engine).generate(prompt, 9).token_ids

    def fail(output, round_):
        if len(output.rounds) == 2:
            raise ValueError

    other = make_prompt(50, seed=3)
    with pytest.raises(ValueError):
        engine.generate(other, 40, on_round=fail)
    found = engine.generate(other, 9)
    assert found.cached_tokens == 49 and found.token_ids == anew(engine).generate(other, 9).token_ids


def test_a_prefill_that_fails_halfway_leaves_nothing(engine, make_prompt, monkeypatch):
    one, other = make_prompt(50, seed=1), make_prompt(50, seed=2)
    engine.generate(one, 5)
    target = backend_of(engine)._target

    def fail(block):
        type(target)._read(target, block[:20])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, "_read", fail, raising=False)
        engine.generate(other, 5)
    for prompt, cached in ((other, 0), (one, 49)):  # the first was copied before it was written over
        found = engine.generate(prompt, 5)
        assert found.cached_tokens == cached and found.token_ids == anew(engine).generate(prompt, 5).token_ids


def test_a_cache_grows_around_its_prefix_and_where_it_cannot_is_read_anew(engine, make_prompt, monkeypatch):
    prompt = make_prompt(50)
    engine.generate(prompt, 5)
    assert engine.generate(torch.cat((prompt, make_prompt(200, seed=1))), 5).cached_tokens == 50
    longer = torch.cat((prompt, make_prompt(400, seed=2)))

    require = KVCache.require

    def full(cache, capacity):
        if cache is engine._cache:  # two of the target's at once do not fit
            raise CapacityError("full")
        return require(cache, capacity)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "require", full)
        found = engine.generate(longer, 5)
    assert found.cached_tokens == 0 and engine.prefix_bytes == 0
    assert found.token_ids == anew(engine).generate(longer, 5).token_ids


def test_what_callers_do_with_their_own_changes_nothing(engine, make_prompt):
    prompt = make_prompt(50)
    first = engine.generate(prompt, 9)
    expected = list(first.token_ids)
    first.token_ids += [1, 2, 3]
    prompt[:] = make_prompt(50, seed=4)  # a tensor that is used again
    other = engine.generate(prompt, 9)
    assert other.cached_tokens == 0 and other.token_ids == anew(engine).generate(prompt, 9).token_ids
    longer = torch.cat((make_prompt(50), torch.tensor([*expected, 1, 2, 3, 4])))
    found = engine.generate(longer, 9)
    assert found.cached_tokens == 58 and found.token_ids == anew(engine).generate(longer, 9).token_ids


# ---- who reuses


def test_an_engine_that_reuses_nothing_is_seen_by_those_that_do(engine, make_prompt):
    prompt, off = make_prompt(50), engine.with_config(prefix_reuse=False)
    expected = engine.generate(prompt, 9)
    off.generate(make_prompt(60, seed=1), 9)  # over the same cache, of which it keeps no account
    again = engine.generate(prompt, 9)
    assert again.cached_tokens == 0 and again.token_ids == expected.token_ids


def test_reuse_can_be_turned_off(engine, make_prompt):
    off = engine.with_config(prefix_reuse=False)
    assert [off.generate(make_prompt(50), 5).cached_tokens for _ in range(2)] == [0, 0]
    assert off.why_not_reused == "it was turned off" and engine.why_not_reused is None
    assert (
        off.with_config(SpecExtendConfig.standard()).why_not_reused
        and not off.with_config(prefix_reuse=True).why_not_reused
    )


def test_models_whose_keys_depend_on_the_prompt_are_left_out(
    make_engine, make_model, make_prompt, hf_twin, monkeypatch
):
    dynamic = make_engine(make_model("dynamic"), make_model("dynamic"), SPECEXTEND)
    assert "dynamic rope" in dynamic.why_not_reused
    wrapped = hf_twin(make_model("gqa"), "specextend")
    layer = wrapped.model.layers[1]
    original = layer.forward
    layer.forward = lambda *args, **options: original(*args, **options)
    patched = make_engine(wrapped, wrapped, SPECEXTEND)
    assert "model.layers.1 has a forward of its own" in patched.why_not_reused
    for engine in (dynamic, patched):
        assert [engine.generate(make_prompt(90), 5).cached_tokens for _ in range(2)] == [0, 0]
    shared = replace(patched.models, target=make_model("gqa"), ranks=2)
    assert "several processes" in SpecExtend(shared, SPECEXTEND).why_not_reused


def test_closing_frees_the_copies(engine, make_prompt):
    for seed in range(3):
        engine.generate(make_prompt(50, seed), 3)
    assert engine.prefix_bytes > 0
    engine.close()
    assert engine.prefix_bytes == 0


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="models of the tests are on the CPU")
def test_nothing_is_captured_anew_for_a_prefix(make_engine, make_model, make_prompt, monkeypatch):
    pytest.importorskip("triton")
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    with monkeypatch.context() as patch:
        patch.setattr("specextend.engine.why_not_captured", lambda *_: None)
        engine = make_engine(target, target, SPECEXTEND, prefix_reuse=LIMITS)
    prompts = [make_prompt(30, seed) for seed in range(2)]
    engine.generate(prompts[0], 4)
    buffer = engine._cache.buffer.data_ptr()
    answers = [engine.generate(prompt, 4) for prompt in (prompts[1], prompts[0], prompts[0])]
    assert [one.cached_tokens for one in answers] == [0, 29, 29] and not any(one.capture_s for one in answers)
    assert engine._cache.buffer.data_ptr() == buffer


# ---- conversations


def test_a_session_says_what_was_said_and_can_be_forked(bundled_models):
    engine = SpecExtend(bundled_models, prefix_reuse=LIMITS)
    document = "The council met at noon. " * 30
    session = engine.session([{"role": "system", "content": document}], sampling=SamplingConfig(0.8, seed=1))
    first = session.ask("What did the council do?", 12)
    assert [one["role"] for one in session.messages] == ["system", "user", "assistant"]
    assert session.messages[-1]["content"] == first.text
    twin = session.fork()
    second = session.ask("And when?", 12)
    assert second.cached_tokens > first.prompt_tokens - 5
    assert len(twin.messages) == 3 and len(session.messages) == 5
    plain = SpecExtend(bundled_models, prefix_reuse=False)
    assert second.token_ids == plain.chat(session.messages[:-1], 12, sampling=SamplingConfig(0.8, seed=1)).token_ids
    assert twin.ask("And when?", 12).token_ids == second.token_ids
    greedy = twin.ask("Why?", 12, sampling=SamplingConfig())
    assert greedy.token_ids == plain.chat(twin.messages[:-1], 12).token_ids
    with pytest.raises(CapacityError):
        session.ask("Too much?", 1 << 20)
    assert len(session.messages) == 5


# ---- a prefill that is ended


class Ended(Exception):
    """Raised between two blocks."""


def ended_after(blocks: int):
    """An `on_block` that lets so many blocks pass, and the list of what it was told."""
    told: list[tuple[str, int]] = []

    def on_block(part: str, tokens: int) -> None:
        told.append((part, tokens))
        if len(told) > blocks:
            raise Ended

    return on_block, told


def assert_ended_leaves_no_trace(engine, prompts, ends, sampling) -> None:
    """Each prompt is given up after so many blocks, perhaps never, then asked for to its end."""
    for prompt, blocks in zip(prompts, ends, strict=True):
        on_block, told = ended_after(blocks)
        try:
            engine.generate(prompt, 6, sampling=sampling, on_block=on_block)
        except Ended:
            assert len(told) == blocks + 1
        found, wanted = (one.generate(prompt, 6, sampling=sampling) for one in (engine, anew(engine)))
        assert found.token_ids == wanted.token_ids
        assert [one.accepted for one in found.rounds] == [one.accepted for one in wanted.rounds]
        if backend_of(engine)._drafter.tap is None:  # heads read the target's features of what they lack
            assert found.cached_tokens >= max(tokens for part, tokens in told if part == "target")


@settings(max_examples=40)
@given(
    cuts=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50), st.integers(0, 30)), min_size=2, max_size=4),
    method=st.sampled_from(EAGER),
    sampling=SAMPLINGS,
)
def test_a_prefill_that_is_ended_leaves_no_trace_but_what_it_read(
    cuts, method, sampling, make_model, perturbed, make_engine, make_prompt
):
    target = make_model("gqa")
    config = replace(config_of(method, TreeConfig(5, 3, 0.1)), prefill_block=7)
    engine = make_engine(target, perturbed(target, 0.1), config, prefix_reuse=LIMITS)
    documents = [make_prompt(50, seed) for seed in range(3)]
    prompts = [torch.cat((documents[which][:cut], make_prompt(3, seed=cut))) for which, cut, _ in cuts]
    assert_ended_leaves_no_trace(engine, prompts, [blocks for *_, blocks in cuts], sampling)


@settings(max_examples=8)
@given(ends=st.lists(st.integers(0, 12), min_size=2, max_size=3), sampling=SAMPLINGS)
def test_a_prefill_of_heads_that_is_ended_leaves_no_trace(ends, sampling, head_models):
    config = SpecExtendConfig.specextend(tree=TreeConfig(8, 4, 0.2), retrieval=RETRIEVAL, prefill_block=16)
    engine = SpecExtend(head_models, config, prefix_reuse=LIMITS)
    text = "The committee met in the morning, and the committee met again in the evening. " * 4
    prompts = [engine.encode(text + "And then?" * place)[20 * place :] for place in range(len(ends))]
    assert_ended_leaves_no_trace(engine, prompts, ends, sampling)


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="models of the tests are on the CPU")
def test_a_captured_engine_whose_prefill_is_ended_goes_on(make_engine, make_model, perturbed, make_prompt, monkeypatch):
    pytest.importorskip("triton")
    target = make_model("gqa", head_dim=32, num_hidden_layers=1)
    config = replace(SPECEXTEND, tree=TreeConfig(3, 2, 0.1), prefill_block=8)
    with monkeypatch.context() as patch:
        patch.setattr("specextend.engine.why_not_captured", lambda *_: None)
        engine = make_engine(target, perturbed(target, 0.3), config, prefix_reuse=LIMITS)
    assert engine.backend == "graphs"
    prompts = [make_prompt(20, seed) for seed in range(3)]
    assert_ended_leaves_no_trace(engine, prompts, [1, 4, 3], SamplingConfig())


def test_blocks_are_told_as_they_come(engine, make_prompt):
    engine = engine.with_config(prefill_block=20)
    on_block, told = ended_after(99)
    engine.generate(make_prompt(50), 3, on_block=on_block)
    assert [tokens for part, tokens in told if part == "target"] == [0, 20, 40]
    assert told[0] == ("target", 0) and {part for part, _ in told[3:]} == {"draft"}
    on_block, told = ended_after(1)
    with pytest.raises(Ended):
        engine.autoregressive(make_prompt(50, seed=1), 3, on_block=on_block)
    assert told == [("target", 0), ("target", 20)]
