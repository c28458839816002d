"""Widened models compute what the small ones compute."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from eagle.drafter import EagleDrafter
from eagle.heads import Eagle1Head, Eagle3Head
from eagle.widen import widen_head
from specextend.config import RetrievalConfig, SpecExtendConfig, TreeConfig
from specextend.models.widen import Shape, widen

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}
SMALL_VOCAB = 97
SHAPES = {
    "larger": Shape(hidden=168, layers=5, heads=12, kv_heads=6, head_dim=32, ffn=200, vocab=130),
    "gqa": Shape(hidden=96, layers=2, heads=16, kv_heads=4, head_dim=16, ffn=96, vocab=97),
    "hardly wider": Shape(hidden=68, layers=2, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=97),
}


def wide_of(model, name):
    shape = SHAPES[name]
    return widen(model, shape, **CPU)


def logits(model, ids):
    model.set_attn_implementation("sdpa")
    try:
        return model(ids[None], use_cache=False).logits[0]
    finally:
        model.set_attn_implementation("specextend")


ROPES = ("gqa", "tied", "linear", "llama3")
PAIRS = [("mha", "larger"), ("mha", "gqa"), *((kind, name) for kind in ROPES for name in SHAPES)]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_logits_are_the_small_models_and_unused_rows_get_nothing(kind, name, make_model, make_prompt):
    small, ids = make_model(kind), make_prompt(300)
    wide = wide_of(small, name)
    theirs, ours = logits(small, ids), logits(wide, ids)
    assert ours.shape[1] == SHAPES[name].vocab
    torch.testing.assert_close(ours[:, :SMALL_VOCAB], theirs, atol=2e-4, rtol=1e-3)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    if SHAPES[name].vocab > SMALL_VOCAB:
        assert ours.softmax(-1)[:, SMALL_VOCAB:].sum() < 1e-20


def test_nothing_that_could_be_skipped_is_zero(make_model):
    wide = wide_of(make_model("gqa"), "larger")
    for layer in wide.model.layers:
        for name in ("k_proj", "v_proj"):
            assert (getattr(layer.self_attn, name).weight != 0).all(), name
        assert (layer.mlp.gate_proj.weight != 0).all() and (layer.mlp.up_proj.weight != 0).all()


def test_a_shape_that_is_too_small_is_refused(make_model):
    with pytest.raises(ValueError, match="hidden 64 of 65, layers 1 of 2.*vocab 96 of 97.*head dim 24 for 16"):
        widen(make_model("gqa"), Shape(64, 1, 4, 2, 24, 96, 96), **CPU)


def random_head(kind, target):
    config = type(target.config)(
        **{name: getattr(target.config, name) for name in (
            "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"
        )},
        num_hidden_layers=1, max_position_embeddings=2048, rms_norm_eps=1e-5,
    )  # fmt: skip
    config._attn_implementation = "specextend"
    torch.manual_seed(1)
    if kind == "eagle1":
        head = Eagle1Head(config, target.get_input_embeddings(), target.get_output_embeddings(), bias=False)
    else:
        head = Eagle3Head(config, target.get_input_embeddings(), (1, 2, 4), torch.arange(0, 96, 2))
    for name, weight in head.named_parameters():
        if not name.startswith(("embed_tokens", "lm_head")) or (kind == "eagle3" and name.startswith("lm_head")):
            weight.requires_grad_(False).normal_(1.0 if weight.ndim == 1 else 0.0, 0.15)
    return head.requires_grad_(False).eval()


@pytest.mark.parametrize("kind", ["eagle1", "eagle3"])
def test_a_widened_head_drafts_the_same_trees(kind, make_model, make_engine, make_prompt):
    small = make_model("gqa", num_hidden_layers=4)
    wide = widen(small, Shape(168, 6, 12, 4, 32, 200, 130), **CPU)
    head = random_head(kind, small)
    wide_head = widen_head(head, small, wide, draft_vocab=60)
    config = SpecExtendConfig.specextend(tree=TreeConfig(12, 4, 0), retrieval=RetrievalConfig(8, 4, 2))
    results = []
    for target, draft in ((small, head), (wide, wide_head)):
        engine = make_engine(target, draft, config, drafter=partial(EagleDrafter, target=target))
        results.append(engine.generate(make_prompt(90), 40))
    assert results[0].token_ids == results[1].token_ids
    assert [one.accepted for one in results[0].rounds] == [one.accepted for one in results[1].rounds]
    assert [one.drafted for one in results[0].rounds] == [one.drafted for one in results[1].rounds]
