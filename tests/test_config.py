"""Settings: their bounds, what contradicts what, nested overrides, and the slots a round needs."""

from __future__ import annotations

import pickle

import pytest

from specextend.cli.flag_names import FLAGS
from specextend.config import (
    RetrievalConfig,
    RoundSlots,
    SamplingConfig,
    SpecExtendConfig,
    TreeConfig,
    override,
)
from specextend.errors import ConfigError, describe
from specextend.methods import METHODS, drafting_of

HUGE = (4611686018427387904, 99999999999999999999)


@pytest.mark.parametrize("value", [*HUGE, -1, 1.5, "8", True, None])
@pytest.mark.parametrize(
    "kind, name",
    [
        (TreeConfig, "nodes"),
        (TreeConfig, "max_depth"),
        (RetrievalConfig, "chunk_size"),
        (RetrievalConfig, "top_k"),
        (RetrievalConfig, "every_n_steps"),
        (RetrievalConfig, "sink"),
        (RetrievalConfig, "recent"),
        (SpecExtendConfig, "prefill_block"),
        (SpecExtendConfig, "draft_window"),
        (SamplingConfig, "top_k"),
    ],
)
def test_integers_out_of_bounds_and_other_types_are_one_line_that_names_the_setting_and_its_flag(kind, name, value):
    with pytest.raises(ConfigError) as raised:
        kind(**{name: value})
    line = describe(raised.value, FLAGS)
    assert f"{name} is {value!r}; " in line and raised.value.setting.split(".")[-1] == name
    assert line.endswith(f"({FLAGS[raised.value.setting]})") and "--" not in str(raised.value)


@pytest.mark.parametrize("name, value", [("threshold", "0.5"), ("min_probability", None), ("threshold", float("nan"))])
def test_numbers_of_another_type_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is "):
        TreeConfig(**{name: value})


def test_the_largest_sizes_are_named():
    with pytest.raises(ConfigError, match="nodes is 1025; give a whole number from 1 to 1024"):
        TreeConfig(nodes=1025)
    with pytest.raises(ConfigError, match="max_depth is 129; give a whole number from 1 to 128"):
        TreeConfig(max_depth=129)
    with pytest.raises(ConfigError, match="retrieval top_k is 40000; in chunks of 32 tokens it may be at most 32768"):
        RetrievalConfig(top_k=40000)


@pytest.mark.parametrize("drafting", ["lookup", "none", "hugging_face"])
@pytest.mark.parametrize("cache", ["streaming", "retrieval"])
def test_a_draft_cache_without_a_draft_is_refused(drafting, cache):
    with pytest.raises(ConfigError, match=f"drafting '{drafting}' has no draft cache") as raised:
        SpecExtendConfig(drafting=drafting, draft_cache=cache)
    assert raised.value.setting == "draft_cache"


def test_names_of_nested_settings_are_not_taken_flat():
    with pytest.raises(ConfigError, match='top_k is a setting of the retrieval; write retrieval={"top_k": 40}'):
        override(SpecExtendConfig(), {"top_k": 40})
    with pytest.raises(ConfigError, match='tree is None; give a mapping like tree={"nodes": 20} or a TreeConfig'):
        override(SpecExtendConfig(), {"tree": None})


def test_an_error_keeps_its_setting_across_processes():
    error = pickle.loads(pickle.dumps(ConfigError("nodes is 0", setting="tree.nodes")))
    assert (str(error), describe(error, FLAGS)) == ("nodes is 0", "ConfigError: nodes is 0 (--nodes)")
    assert describe(ConfigError("a\n b"), FLAGS) == "ConfigError: a b"


def test_slots_of_a_round():
    tree, retrieval = TreeConfig(nodes=20, max_depth=6), RetrievalConfig(chunk_size=8, top_k=4, every_n_steps=3)
    sizes = {"tree": tree, "retrieval": retrieval}
    assert SpecExtendConfig.standard(**sizes).slots == RoundSlots(verify=21, path=7, draft=120, working=None)
    assert SpecExtendConfig.specextend(**sizes).slots == RoundSlots(21, 7, 120, 32 + 4 * 7)
    assert SpecExtendConfig(drafting="none", **sizes).slots == RoundSlots(1, 1, 0, None)


@pytest.mark.parametrize("method", ["prompt_lookup", "magicdec", "self_retrieval", "triforce"])
def test_a_chain_longer_than_the_tree_has_its_slots(method):
    config = override(METHODS[method].config(TreeConfig(), RetrievalConfig()), {"tree": {"max_depth": 64}})
    assert config.slots.verify == config.slots.path == 65


def test_records_of_both_names_are_understood():
    assert drafting_of({"drafting": "self"}) == drafting_of({"draft": "self"}) == "self"
    assert drafting_of({}) == "model"
