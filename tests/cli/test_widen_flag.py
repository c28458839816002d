"""`--widen`: the same tokens from larger models, under names that say so."""

from __future__ import annotations

import argparse

import pytest
import torch

import eagle.entry
from specextend.cli import commands, flags
from specextend.cli.engines import uniform_engine
from specextend.data.builtin import builtin_text
from specextend.errors import CapacityError, ConfigError, ModelError
from specextend.evaluation.plan import Plan, default_output, setting_of
from specextend.models import widen
from specextend.models.widen import PAIRS, SHAPES, Shape, WidePair

LOADERS = {"small": (flags.add_model_flags, commands.load_pair)} | {
    head: (lambda parser, **_: eagle.entry.add_model_flags(parser), eagle.entry.load_pair)
    for head in ("eagle1", "eagle3")
}


@pytest.fixture
def tiny_pair(monkeypatch):
    """A pair of shapes a little larger than the bundled models, called "tiny"."""
    monkeypatch.setitem(SHAPES, "tiny_target", Shape(448, 8, 8, 8, 64, 1088, 8200))
    monkeypatch.setitem(SHAPES, "tiny_draft", Shape(320, 3, 5, 5, 64, 768, 8200))
    monkeypatch.setitem(PAIRS, "tiny", WidePair("tiny_target", "tiny_draft", 4200, torch.float16))


def loaded(kind: str, *words: str):
    add, load = LOADERS[kind]
    parser = flags.parser("test")
    add(parser, widen=True)
    flags.add_method_flags(parser)
    head = ["--head", kind] if kind != "small" else []
    args: argparse.Namespace = parser.parse_args(
        ["--device", "cpu", *head, "--use_specextend", "--tree", "paper", *words]
    )
    models = load(args)
    return uniform_engine(models, [flags.config_from(args, models)], eager=False)


@pytest.mark.parametrize("kind", LOADERS)
def test_widened_models_decode_the_same_tokens_and_accept_as_many(kind, tiny_pair):
    small, wide = loaded(kind), loaded(kind, "--widen", "tiny")
    prompt = small.encode(builtin_text()[:1500])[:300]
    ours, theirs = (engine.generate(prompt, 24) for engine in (wide, small))
    assert ours.token_ids == theirs.token_ids == wide.autoregressive(prompt, 24).token_ids
    assert [one.accepted for one in ours.rounds] == [one.accepted for one in theirs.rounds]
    assert wide.models.target.config.hidden_size == 448 and wide.models.vocab_size == 8200
    assert wide.models.dtype == wide.models.draft.dtype == torch.float32 if kind == "small" else True


def test_the_shape_stands_wherever_a_number_does(tiny_pair):
    engine = loaded("small", "--widen", "tiny")
    setting = setting_of(engine, Plan("toy", {}))
    assert setting["model"] == "bundled widened to tiny"
    assert setting["target"] == "bundled/target widened to tiny_target"
    assert setting["draft"] == "bundled/draft widened to tiny_draft"
    name = "toy_bundled-widened-to-tiny_draft-widened-to-tiny_draft_specextend.json"
    assert str(default_output(setting)) == f"results/{name}"


def test_the_runs_dtype_is_taken_from_the_small_float32_weights(tiny_pair):
    wide = loaded("small", "--widen", "tiny", "--dtype", "bfloat16").models
    small = loaded("small").models
    exact = small.target.get_input_embeddings().weight[:50].to(torch.bfloat16)
    assert torch.equal(wide.target.get_input_embeddings().weight[:50, :384], exact)
    assert wide.dtype == torch.bfloat16


def test_mistakes_are_one_line(tiny_pair, monkeypatch):
    with pytest.raises(ConfigError, match="dtype 'int3' is unknown"):
        loaded("small", "--widen", "tiny", "--dtype", "int3")
    monkeypatch.setitem(SHAPES, "tiny_draft", Shape(64, 3, 5, 5, 64, 768, 8200))
    with pytest.raises(ModelError, match="bundled cannot be widened to tiny_draft: .*hidden 64 of"):
        loaded("small", "--widen", "tiny")
    monkeypatch.setattr("specextend.models.checkpoints.available_bytes", lambda device: 10_000_000_000)
    with pytest.raises(CapacityError, match="bundled widened to vicuna_7b needs 27.2"):
        loaded("small", "--widen", "vicuna_7b")


def test_published_sizes():
    billions = {name: shape.parameters / 1e9 for name, shape in widen.SHAPES.items()}
    assert billions["vicuna_7b"] == pytest.approx(6.74, abs=0.01)
    assert billions["llama31_8b"] == pytest.approx(8.03, abs=0.01)
    assert billions["vicuna_68m"] == pytest.approx(0.068, abs=0.001)
    assert billions["llama32_1b"] == pytest.approx(1.498, abs=0.01)  # 1.236, whose LM head is its embedding
