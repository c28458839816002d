"""Arms as they are written, and the settings they come to."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from specextend.cli import commands, flags
from specextend.config import TREES, RetrievalConfig, SpecExtendConfig, TreeConfig
from specextend.errors import ConfigError
from specextend.evaluation.arms import Arm, read_arm, read_arms, resolve
from specextend.methods import METHODS
from specextend.models.presets import Preset

RETRIEVAL = RetrievalConfig()
BASES = {name: method.config(TreeConfig(), RETRIEVAL) for name, method in METHODS.items()}


def config_of(text: str) -> SpecExtendConfig:
    arm = read_arm(text)
    return arm.config(BASES[arm.method])


def test_an_arm_without_settings_is_its_method():
    for name in METHODS:
        assert read_arm(name) == Arm(name, None, {}) and config_of(name) == BASES[name]
        assert read_arm(name).name == name


@pytest.mark.parametrize(
    "text, part, changed",
    [
        ("specextend:top_k=8", "retrieval", {"top_k": 8}),
        ("fa_hta_streaming:top_k=8,chunk_size=16,sink=1", "retrieval", {"top_k": 8, "chunk_size": 16, "sink": 1}),
        ("specextend:every_n_steps=2,recent=3", "retrieval", {"every_n_steps": 2, "recent": 3}),
        ("standard:nodes=20,max_depth=5", "tree", {"nodes": 20, "max_depth": 5}),
        ("specextend:threshold=0.05,min_probability=0.1", "tree", {"threshold": 0.05, "min_probability": 0.1}),
    ],
)
def test_settings_of_an_arm_change_their_own_fields(text, part, changed):
    base = BASES[read_arm(text).method]
    assert config_of(text) == replace(base, **{part: replace(getattr(base, part), **changed)})
    assert read_arm(text).name == text


def test_tree_says_where_the_settings_of_a_tree_begin():
    run = replace(BASES["specextend"], tree=TreeConfig(nodes=12, max_depth=8, threshold=0.35))
    assert read_arm("specextend:tree=price").config(run).tree == TREES["price"]
    assert read_arm("specextend:tree=price,nodes=20").config(run).tree == replace(TREES["price"], nodes=20)
    assert read_arm("specextend:tree=paper").config(run).tree == TreeConfig()
    without = replace(TREES["price"], lookup_branch=False)
    assert read_arm("specextend:tree=price,lookup_branch=false").config(run).tree == without
    assert read_arm("fa_hta:tree=price").config(run).tree == without
    assert read_arm("fa_hta:tree=price,lookup_branch=true").config(run).tree == TREES["price"]
    assert read_arm("fa_hta:tree=price,lookup_branch=true").name == "fa_hta:tree=price,lookup_branch=true"
    assert read_arm("specextend:nodes=20").config(run).tree == replace(run.tree, nodes=20)


def test_bounds_without_a_tree_take_the_place_of_priced_ones_unless_the_run_named_them():
    run = replace(BASES["specextend"], tree=TREES["price"])
    assert read_arm("specextend:nodes=20").config(run).tree == TreeConfig(nodes=20)
    assert read_arm("specextend:nodes=20").config(run, keeps_rule=True).tree == replace(TREES["price"], nodes=20)


@pytest.mark.parametrize(
    "text, message",
    [
        ("specextendd", "method 'specextendd' is unknown; choose one of autoregressive, "),
        ("", "method '' is unknown"),
        ("specextend:", "write NAME:SETTING=VALUE"),
        ("specextend:top_k", "write NAME:SETTING=VALUE"),
        ("specextend:top_k=", "write NAME:SETTING=VALUE"),
        ("specextend:topk=8", "setting 'topk' is unknown; there are tree, nodes, max_depth, threshold"),
        ("specextend:rule=price", "setting 'rule' is unknown"),
        ("specextend:top_k=8,top_k=9", "top_k is there twice"),
        ("specextend:top_k=8.5", "top_k is '8.5'; give a whole number"),
        ("specextend:threshold=low", "threshold is 'low'; give a number"),
        ("specextend:tree=price,lookup_branch=1", "lookup_branch is '1'; give true or false"),
        ("specextend:tree=tall", "tree 'tall' is unknown; choose one of paper, price"),
        ("specextend:top_k=0", "arm specextend:top_k=0: retrieval top_k is 0; give a whole number from 1"),
        ("specextend:tree=price,threshold=0.5", "priced trees have no such bound"),
        ("standard:top_k=8", "the draft of standard attends to everything"),
        ("prompt_lookup:tree=price", "prompt_lookup drafts chains of its own length"),
        ("autoregressive_hf:nodes=3", "autoregressive_hf drafts nothing"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_arm(text, message):
    with pytest.raises(ConfigError) as error:
        config_of(text)
    assert message in str(error.value) and "\n" not in str(error.value) and "arm " in str(error.value)


def test_every_arm_is_there_once():
    with pytest.raises(ConfigError, match="arm specextend:nodes=5,top_k=8 is there twice"):
        read_arms(["specextend:top_k=8,nodes=5", "standard", "specextend:nodes=5,top_k=8"])
    notes = []
    arms = read_arms(["standard", "specextend", "specextend:top_k=32", "specextend:top_k=8"])
    configs = resolve(arms, lambda arm: arm.config(BASES[arm.method]), notes.append)
    assert list(configs) == ["standard", "specextend", "specextend:top_k=8"]
    assert configs["specextend:top_k=8"].retrieval.top_k == 8
    assert notes == ["specextend:top_k=32 is left out: with these models it is the setting of specextend"]


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], [TREES["price"], TreeConfig(nodes=20, threshold=0.05), TreeConfig(nodes=20)]),
        (["--tree", "paper"], [TreeConfig(), TreeConfig(nodes=20, threshold=0.05), TreeConfig(nodes=20)]),
    ],
)
def test_a_bound_means_a_tree_of_fixed_bounds_unless_the_run_names_another(words, expected, monkeypatch):
    monkeypatch.setattr(flags, "default_tree", lambda models: TREES["price"])
    arms = ["specextend:top_k=8", "specextend:threshold=0.05,nodes=20", "specextend:nodes=20"]
    assert trees_of([*words, "--arms", *arms]) == expected


def test_a_bound_of_a_run_of_priced_trees_is_one_of_their_size():
    assert trees_of(["--tree", "price", "--arms", "specextend:nodes=20"]) == [replace(TREES["price"], nodes=20)]
    with pytest.raises(ConfigError, match="priced trees have no such bound"):
        trees_of(["--tree", "price", "--arms", "specextend:threshold=0.05"])


def trees_of(words: list[str]) -> list[TreeConfig]:
    """The tree of each arm on a command line."""
    parser = flags.parser("test")
    commands.add_eval_flags(parser)
    models = SimpleNamespace(preset=Preset("tiny", "tiny", None), device=torch.device("cpu"), ranks=1)
    return [config.tree for config in flags.arm_configs(parser.parse_args(words), models).values()]
