"""docs/scale.md: its numbers are what the formulas say, and the formulas what the models and caches really hold."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import LlamaConfig

from scripts.bench import model_size as size_model
from specextend.cli import flags
from specextend.config import RetrievalConfig, SpecExtendConfig, TreeConfig, prefill_block
from specextend.drafting.small_lm import ClassicDrafter
from specextend.evaluation.environment import ROOT
from specextend.modeling.cache import KVCache
from specextend.models.checkpoints import weight_bytes
from specextend.models.widen import Shape

PAGE = (ROOT / "docs" / "scale.md").read_text()


def config_of(shape: Shape, **more) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.ffn,
        vocab_size=shape.vocab, tie_word_embeddings=False, **more,
    )  # fmt: skip


def test_the_pages_table_is_the_scripts():
    written = PAGE.split("<!-- sizing:begin -->\n")[1].split("\n<!-- sizing:end -->")[0]
    assert written == size_model.table(1 << 17, [1, 2, 4, 8])


def test_the_pages_numbers_in_the_text_are_the_scripts():
    big, small, trees = size_model.LLAMA_70B, size_model.LLAMA_1B, (TreeConfig(), RetrievalConfig())
    said = " ".join(PAGE.split())
    assert f"For the 70B model that is {size_model.cache_bytes(big, 1):,} bytes per token" in said
    assert f"({size_model.cache_bytes(small, 1):,} bytes per token)" in said
    assert f"{size_model.working_tokens(*trees):,} whatever the context" in said
    rows = prefill_block(SpecExtendConfig.specextend(), torch.device("cuda"))
    activations = 2 * rows * (4 * big.hidden + 3 * big.ffn / 2) / 1e9
    assert f"a prefill block of {rows:,} tokens" in said and f"{activations:.1f} GB on two devices" in said
    layers = [
        2 * (size_model.split_weights(shape) - shape.vocab * shape.hidden) + size_model.cache_bytes(shape, 16000)
        for shape in (Shape(4096, 32, 32, 32, 128, 11008, 32000), big)
    ]
    ms = [one / layer.layers / size_model.H200_TB_S / 1e9 for one, layer in zip(layers, (SEVEN, big), strict=True)]
    assert f"a layer of Vicuna-7B is {ms[0]:.2f} ms on one H200, one of Llama-3.1-70B {ms[1]:.1f}" in said
    two, four = (size_model.need(big, small, 1 << 17, ranks, *trees).total / 1e9 for ranks in (2, 4))
    assert 80 < two < 0.8 * 141 and four < 0.8 * 80  # "two H200 hold it, four of 80 GB as well, two do not"


SEVEN = Shape(4096, 32, 32, 32, 128, 11008, 32000)


@pytest.mark.parametrize("shape", [size_model.LLAMA_70B, size_model.LLAMA_1B, SEVEN])
def test_weights_are_counted_as_transformers_makes_them(shape):
    counted = size_model.BYTES * (size_model.split_weights(shape) + size_model.whole_weights(shape))
    assert counted == weight_bytes(config_of(shape), torch.bfloat16)


def test_caches_are_counted_as_ours_are_made(make_model):
    shape = Shape(64, 2, 4, 2, 16, 96, 97)
    cache = KVCache(config_of(shape), torch.float16, torch.device("cpu"))
    cache.reset(50)
    assert cache.nbytes == size_model.cache_bytes(shape, 50)
    tree, retrieval = TreeConfig(7, 3), RetrievalConfig(8, 5, 2)
    drafter = ClassicDrafter(make_model("gqa"), SpecExtendConfig.specextend(tree=tree, retrieval=retrieval), 97)
    drafter._reset(100, 50, 0)
    assert drafter.cache.working.capacity == size_model.working_tokens(tree, retrieval)


def test_every_flag_and_script_the_page_names_exists():
    flags = set(re.findall(r"`(--\w+)`", PAGE)) - {"--nnodes"}  # torchrun's
    sources = "".join(path.read_text() for path in (ROOT / "specextend" / "cli").glob("*.py"))
    assert flags and all(f'"{flag}"' in sources for flag in flags)
    modules = {name.replace(".", "/") + ".py" for name in re.findall(r"scripts\.\w+\.\w+", PAGE)}
    assert modules and all((ROOT / path).exists() for path in {*modules, *re.findall(r"scripts/\w+\.(?:py|sh)", PAGE)})


@pytest.mark.parametrize("flags_", ["--ranks 0", "--tokens -5"])
def test_sizes_that_are_none_are_refused_in_one_line(flags_, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["model_size", *flags_.split()])
    with pytest.raises(SystemExit) as exit_:
        flags.run(size_model.main)
    assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1
