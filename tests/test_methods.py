"""Every named method: lossless, leaving no trace between prompts, and what the flags say; prompt lookup by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import backend_of

from specextend.cli import commands, flags
from specextend.config import DRAFT_CACHES, RetrievalConfig, SamplingConfig, SpecExtendConfig, TreeConfig
from specextend.decoding.hugging_face import plain_twin
from specextend.drafting.ngrams import continuation
from specextend.drafting.self_speculation import HierarchicalDrafter
from specextend.errors import ConfigError
from specextend.methods import METHODS, find_method, name_of

TREE = TreeConfig(nodes=12, max_depth=4, threshold=0.1)
RETRIEVAL = RetrievalConfig(chunk_size=8, top_k=6, every_n_steps=2)
LENGTHS = (300, 40, 3, 1)  # descending, through one engine: what a longer prompt left behind would show
NEW = 40
DRAFTING = [name for name in METHODS if not name.startswith("autoregressive")]


@pytest.fixture(scope="module")
def engine_of(make_model, perturbed, make_engine):
    """engine_of(method): tiny models, a draft that is right now and then, prefills in several blocks."""
    target = make_model("gqa")
    draft = perturbed(target, 0.05)

    def make(method: str):
        return make_engine(target, draft, METHODS[method].config(TREE, RETRIEVAL))

    return make


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_equals_autoregressive_decoding(method, temperature, engine_of, make_prompt):
    engine, sampling = engine_of(method), SamplingConfig(temperature, seed=3)
    for length in LENGTHS:
        prompt = make_prompt(length, seed=length)
        expected = engine.autoregressive(prompt, NEW, sampling=sampling)
        result = engine.generate(prompt, NEW, sampling=sampling)
        assert result.token_ids == expected.token_ids
        assert [t for one in result.rounds for t in one.tokens] == expected.token_ids[1:]


@pytest.mark.parametrize("method", METHODS)
def test_no_method_remembers_the_last_prompt(method, engine_of, make_prompt):
    used = engine_of(method)
    for length in LENGTHS:
        prompt = make_prompt(length, seed=length)
        fresh, again = (engine.generate(prompt, NEW) for engine in (engine_of(method), used))
        assert [(r.drafted, r.accepted, r.tokens) for r in again.rounds] == [
            (r.drafted, r.accepted, r.tokens) for r in fresh.rounds
        ]


@pytest.mark.parametrize("method", DRAFTING)
def test_every_drafting_method_gets_drafts_accepted(method, engine_of, make_prompt):
    # of a text that repeats itself; otherwise the tests above would show nothing
    engine = engine_of(method)
    rounds = engine.generate(make_prompt(30).repeat(8), 80).rounds
    assert sum(one.accepted for one in rounds) > 0 and all(one.accepted <= one.drafted for one in rounds)


@pytest.mark.parametrize("method", ["self_retrieval", "magicdec", "triforce"])
def test_self_speculation_that_keeps_everything_is_always_right(
    method, make_model, perturbed, make_engine, make_prompt
):
    target = make_model("gqa")
    config = METHODS[method].config(TREE, RetrievalConfig(chunk_size=8, top_k=64, every_n_steps=2))
    engine = make_engine(target, perturbed(target, 0.5), config)
    for length in (300, 1):
        rounds = engine.generate(make_prompt(length), 1 + 5 * (config.tree.max_depth + 1)).rounds
        assert [(one.drafted, one.accepted) for one in rounds] == [(config.tree.max_depth,) * 2] * 5


@pytest.mark.parametrize("method", ["self_retrieval", "magicdec", "triforce"])
def test_self_speculation_drafts_from_a_part_of_the_cache(method, engine_of, make_prompt):
    engine = engine_of(method)
    engine.generate(make_prompt(300), NEW)
    assert 40 < backend_of(engine)._drafter._sparse.cache.length < 48 + 3 * 7 < 300  # the newest chunk may be short


def test_autoregressive_methods_take_one_round_per_token(engine_of, make_prompt):
    for method in ("autoregressive", "autoregressive_hf"):
        result = engine_of(method).generate(make_prompt(50), 20)
        assert [(one.drafted, one.accepted, len(one.tokens)) for one in result.rounds] == [(0, 0, 1)] * 19
        assert "target" in result.prefill_seconds and all(one.seconds["verify"] > 0 for one in result.rounds)


def test_hugging_face_decodes_eagerly_on_the_same_weights_unpacked(bundled_models):
    twin, ours = plain_twin(bundled_models.target), bundled_models.target
    assert twin.config._attn_implementation == "eager" != ours.config._attn_implementation
    assert twin.get_input_embeddings().weight is ours.get_input_embeddings().weight
    assert type(twin.model.layers[0].mlp.up_proj) is torch.nn.Linear


@pytest.mark.parametrize("method", ["autoregressive_hf", "triforce", "prompt_lookup"])
@pytest.mark.parametrize("end", ["eos", "stop"])
def test_methods_end_where_autoregressive_decoding_ends(method, end, make_model, perturbed, make_engine, make_prompt):
    target, prompt = make_model("gqa"), make_prompt(60)
    config = METHODS[method].config(TREE, RETRIEVAL)
    free = make_engine(target, perturbed(target, 0.01), config).autoregressive(prompt, 30)
    eos, stop = ((free.token_ids[11],), ()) if end == "eos" else ((), (free.text[22:26],))
    engine = make_engine(target, perturbed(target, 0.01), config, eos=eos)
    expected, result = (g(prompt, 30, stop=stop) for g in (engine.autoregressive, engine.generate))
    assert expected.finish_reason == result.finish_reason == end
    assert (result.token_ids, result.text) == (expected.token_ids, expected.text)


# ---- prompt lookup


@pytest.mark.parametrize(
    "context, expected",
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1]),
        ([7, 2, 3, 8, 9, 3, 5, 2, 3], [8, 9, 3]),  # the pair before the single token, though it stands further back
        ([3, 4, 3, 5, 3], [5, 3]),  # the latest place; what follows may reach into the newest tokens
        ([1, 2, 3, 9, 6, 2, 3, 8, 1, 2, 3], [9, 6, 2]),
        ([6, 6], [6]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_continuation_follows_the_longest_and_latest_match(context, expected):
    for spare in (0, 5):  # what lies behind the context in a buffer is nothing
        tokens, exist = continuation(torch.tensor([*context, *[2] * spare]), torch.tensor(len(context)), 3)
        assert tokens[exist].tolist() == expected


def test_prompt_lookup_proposes_nothing_for_new_tokens_and_all_of_a_loop(make_model, make_engine, make_prompt):
    target = make_model("gqa")
    engine = make_engine(target, config=METHODS["prompt_lookup"].config(TREE, RETRIEVAL))
    drafted = [one.drafted for one in engine.generate(torch.arange(60), 20).rounds]
    assert min(drafted) >= 0 and max(drafted) <= 10


# ---- names and flags


def parse(*typed: str):
    parser = flags.parser("test")
    flags.add_method_flags(parser)
    return parser.parse_args(typed)


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_has_the_name_of_its_method_whatever_its_sizes(method):
    for tree, retrieval in ((TREE, RETRIEVAL), (TreeConfig(), RetrievalConfig())):
        assert name_of(METHODS[method].config(tree, retrieval)) == method


def test_names_of_the_papers_settings_and_of_those_between():
    assert name_of(SpecExtendConfig.standard()) == "standard"
    assert name_of(SpecExtendConfig.specextend()) == "specextend"
    assert name_of(SpecExtendConfig(flash_prefill=True, draft_cache="streaming")) == "fa-streaming"


def test_working_caches_of_all_methods_are_of_one_size():
    sizes = {
        name: config.retrieval.top_k * config.retrieval.chunk_size
        for name, config in ((name, method.config(TREE, RetrievalConfig())) for name, method in METHODS.items())
    }
    assert set(sizes.values()) == {1024}, sizes


def test_methods_that_share_the_fast_parts_differ_in_the_draft_alone():
    fast = [METHODS[name].config(TREE, RETRIEVAL) for name in METHODS if METHODS[name].switches.get("flash_prefill")]
    assert len({(config.prefill_block, config.draft_window) for config in fast}) == 1


@pytest.mark.parametrize(
    "typed", [("--use_specextend",), ("--method", "specextend"), ("--use_specextend", "--method", "specextend")]
)
def test_use_specextend_is_the_method_of_that_name(typed):
    assert flags.methods_from(parse(*typed)) == ["specextend"]


def test_without_flags_the_method_is_standard():
    assert flags.methods_from(parse()) == ["standard"]


def test_evaluations_take_several_methods_each_with_its_own_file():
    parser = flags.parser("test")
    commands.add_eval_flags(parser)
    names = flags.methods_from(parser.parse_args(["--method", "cmr", "magicdec"]))
    assert names == ["cmr", "magicdec"]
    assert commands._output_files(None, names) == {"cmr": None, "magicdec": None}
    files = commands._output_files(Path("a/x_{method}.json"), names)
    assert files == {"cmr": Path("a/x_cmr.json"), "magicdec": Path("a/x_magicdec.json")}
    with pytest.raises(ConfigError, match=r"a\.json for 2 methods; put \{method\} into its name"):
        commands._output_files(Path("a.json"), names)


def test_contradicting_and_unknown_methods_are_refused():
    with pytest.raises(ConfigError, match="contradicts --method standard"):
        flags.methods_from(parse("--use_specextend", "--method", "standard"))
    with pytest.raises(ConfigError, match="'medusa' is unknown; choose one of autoregressive, "):
        find_method("medusa")


def test_list_methods_prints_a_line_each_and_exits_0(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stopped:
        parse("--list_methods")
    lines = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 0
    assert [line.split()[0] for line in lines] == list(METHODS) and all(len(line.split()) > 2 for line in lines)

    monkeypatch.setenv("COLUMNS", "60")  # longer lines go on below their beginning
    with pytest.raises(SystemExit):
        parse("--list_methods")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(METHODS)
    assert max(map(len, lines)) <= 60


def test_a_self_draft_over_the_full_cache_is_refused():
    assert "full" in DRAFT_CACHES
    with pytest.raises(ConfigError, match="the target itself"):
        SpecExtendConfig(drafting="self")


def test_an_eagle_head_is_no_small_draft_for_the_sparse_target(engine_of):
    engine = engine_of("triforce")
    head = type("Head", (), {"tap": object()})()
    with pytest.raises(ConfigError, match="triforce drafts with a small LM"):
        HierarchicalDrafter(head, backend_of(engine)._drafter._sparse, engine.config)


@pytest.mark.parametrize("kind", ["mha", "qwen3", "llama3", "dynamic"])
@pytest.mark.parametrize("method", ["autoregressive_hf", "prompt_lookup", "magicdec", "self_retrieval", "triforce"])
def test_rivals_are_lossless_on_other_families_and_rotary_embeddings(
    method, kind, make_model, perturbed, make_engine, make_prompt
):
    target = make_model(kind)
    engine = make_engine(target, perturbed(target, 0.05), METHODS[method].config(TREE, RETRIEVAL))
    for length in (150, 40):
        prompt = make_prompt(length)
        assert engine.generate(prompt, 24).token_ids == engine.autoregressive(prompt, 24).token_ids
