"""Loading models: tiny checkpoints with the real ones' keys and configs, and every way a checkpoint can be wrong."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from specextend.errors import CapacityError, ConfigError, DeviceError, ModelError, SpecExtendError
from specextend.models import checkpoints
from specextend.models.checkpoints import check_supported, find_checkpoint, read_config, weight_bytes
from specextend.models.loading import load_models, load_tokenizer
from specextend.models.placement import check_placement, choose_device, choose_dtype
from specextend.models.positions import position_limit
from specextend.models.presets import BUNDLED_DIR, LONG_DIR, PRESETS, find_preset

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
}
LLAMA = {**SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
VICUNA = {
    **LLAMA,
    "_name_or_path": "vicuna-7b-v1.5-16k",
    "max_position_embeddings": 4096,
    "max_sequence_length": 16384,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
}
LONGCHAT_FIRST = {
    **LLAMA,
    "max_position_embeddings": 2048,
    "max_sequence_length": 16384,
    "rms_norm_eps": 1e-06,
    "rope_condense_ratio": 8,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
}
LONGCHAT_MAIN = {**LONGCHAT_FIRST, "rope_scaling": {"factor": 8.0, "type": "linear"}}
SMALL_68M = {
    **LLAMA,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float32",
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31 = {
    **LLAMA,
    "eos_token_id": [2, 5, 6],
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TIED = {**LLAMA, "tie_word_embeddings": True, "max_position_embeddings": 2048}
QWEN2 = {
    **SIZES,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 1,
    "eos_token_id": 2,
}
QWEN3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
MISTRAL = {
    **SIZES,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}
FAMILY = {
    "vicuna": VICUNA,
    "longchat_first": LONGCHAT_FIRST,
    "longchat_main": LONGCHAT_MAIN,
    "small_68m": SMALL_68M,
    "llama31": LLAMA31,
    "tied": TIED,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
}

Write = Callable[..., Path]


def weights_of(config: dict) -> dict[str, torch.Tensor]:
    """Random weights under the keys of the published files: no `lm_head` where it is tied."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    kv = config.get("num_key_value_heads", heads) * head_dim
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (heads * head_dim, hidden),
            "self_attn.k_proj.weight": (kv, hidden),
            "self_attn.v_proj.weight": (kv, hidden),
            "self_attn.o_proj.weight": (hidden, heads * head_dim),
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
        }
        if config["model_type"] == "qwen2":
            block |= {
                "self_attn.q_proj.bias": (hidden,),
                "self_attn.k_proj.bias": (kv,),
                "self_attn.v_proj.bias": (kv,),
            }
        if config["model_type"] == "qwen3":
            block |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_tokenizer(directory: Path, tokens: list[str] | None = None) -> None:
    """A tokenizer of 96 tokens: three control tokens, then single characters."""
    tokens = tokens or ["<unk>", "<s>", "</s>", *map(chr, range(33, 126))]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=tokens[1], eos_token=tokens[2], unk_token="<unk>"
    ).save_pretrained(directory)


def write_weights(directory: Path, weights: dict[str, torch.Tensor], layout: str) -> None:
    """`layout`: "safetensors" or "bin", single file or "sharded_...", as save_pretrained of their time wrote them."""
    stem, extension = ("pytorch_model", "bin") if layout.endswith("bin") else ("model", "safetensors")
    save = torch.save if extension == "bin" else save_file
    if not layout.startswith("sharded"):
        save(weights, directory / f"{stem}.{extension}")
        return
    names, weight_map = sorted(weights), {}
    for shard, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{shard:05d}-of-00002.{extension}"
        save({name: weights[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / f"{stem}.{extension}.index.json").write_text(json.dumps(index))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint and returns its directory."""

    def write_checkpoint(
        config: dict, name: str = "model", *, layout: str = "safetensors", weights: dict | None = None, **changes
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        config = {**config, **changes}
        (directory / "config.json").write_text(json.dumps(config))
        write_weights(directory, weights_of(config) if weights is None else weights, layout)
        write_tokenizer(directory)
        return directory

    return write_checkpoint


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache and a network that answers nothing; returns the cache."""

    def refuse(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def load_target(directory: Path, **options):
    return load_models(str(directory), with_draft=False, device="cpu", **options)


def refusal(kind: type[SpecExtendError], function: Callable, *args, **options) -> str:
    """The message of the error `function` raises, checked to be one line."""
    with pytest.raises(kind) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and message
    return message


def plain_inv_freq(config: dict, theta: float = 10000.0) -> torch.Tensor:
    dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


# ---- names --------------------------------------------------------------------------------------------------------


def test_presets_name_the_published_checkpoints():
    pairs = {name: (preset.target, preset.draft, preset.template) for name, preset in PRESETS.items()}
    assert pairs.pop("bundled") == (str(BUNDLED_DIR / "target"), str(BUNDLED_DIR / "draft"), None)
    assert pairs.pop("bundled_128k") == (str(LONG_DIR), str(BUNDLED_DIR / "draft"), None)
    assert pairs == {
        "vicuna_7b": ("lmsys/vicuna-7b-v1.5-16k", "double7/vicuna-68m", "vicuna_v1.1"),
        "longchat_7b": ("lmsys/longchat-7b-16k", "JackFram/llama-68m", "vicuna_v1.1"),
        "llama31_8b": ("meta-llama/Llama-3.1-8B-Instruct", None, "chat"),
        "r1_distill_llama_8b": ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", None, "chat"),
        "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", None, "chat"),
    }


def test_preset_templates_are_those_fschat_uses():
    conversation = pytest.importorskip("fastchat.conversation")
    for preset in PRESETS.values():
        assert preset.template in (None, "chat") or conversation.get_conv_template(preset.template)


def test_find_preset_knows_a_preset_by_hub_id_and_by_directory_name(tmp_path):
    assert find_preset("lmsys/longchat-7b-16k").name == "longchat_7b"
    local = tmp_path / "vicuna-7b-v1.5-16k"
    local.mkdir()
    preset = find_preset(str(local))
    assert (preset.name, preset.target, preset.draft) == ("vicuna_7b", str(local), "double7/vicuna-68m")
    assert find_preset("lmsys/vicuna-13b-v1.5").template == "vicuna_v1.1"
    assert find_preset("mistralai/Mistral-7B-v0.3").template is None


@pytest.mark.parametrize("name", ["vicuna", "./nowhere", "/nowhere/at/all", ""])
def test_unknown_name_lists_the_presets(name):
    message = refusal(ModelError, load_models, name)
    assert repr(name) in message and "vicuna_7b" in message and "bundled" in message


@pytest.mark.parametrize("name", ["llama31_8b", "r1_distill_llama_8b"])
def test_preset_without_small_draft_asks_for_one(name):
    message = refusal(ModelError, load_models, name)
    assert name in message and "small draft model of its own" in message and "Llama-3.2-1B-Instruct" in message


def test_directory_without_draft_asks_for_one(write):
    with pytest.raises(ModelError, match="small draft model of its own") as raised:
        load_models(str(write(VICUNA)))
    assert raised.value.setting == "draft_model"


# ---- hub ----------------------------------------------------------------------------------------------------------


def cache_snapshot(write: Write, cache: Path, repo: str, config: dict, **options) -> Path:
    """A checkpoint laid out as `hf download` leaves it."""
    storage = cache / f"models--{repo.replace('/', '--')}"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text("0" * 40)
    return write(config, str(storage / "snapshots" / ("0" * 40)), **options)


@pytest.mark.parametrize("name, repo", [("vicuna_7b", "lmsys/vicuna-7b-v1.5-16k"), ("some/model", "some/model")])
def test_weights_out_of_reach_name_the_command(no_network, name, repo):
    message = refusal(ModelError, load_models, name, draft="bundled/draft")
    assert f"hf download {repo}" in message and "`bundled` needs no download" in message


def test_preset_loads_from_the_cache_without_network(no_network, write):
    cache_snapshot(write, no_network, "lmsys/vicuna-7b-v1.5-16k", VICUNA, layout="sharded_bin")
    cache_snapshot(write, no_network, "double7/vicuna-68m", SMALL_68M)
    loaded = load_models("vicuna_7b", device="cpu")
    assert (loaded.name, loaded.limit, loaded.vocab_size) == ("vicuna_7b", 16384, 96)
    assert (loaded.target_id, loaded.draft_id) == ("lmsys/vicuna-7b-v1.5-16k", "double7/vicuna-68m")
    assert loaded.preset.template == "vicuna_v1.1"


def test_incomplete_cache_is_not_taken_for_the_model(no_network, write):
    directory = cache_snapshot(write, no_network, "lmsys/vicuna-7b-v1.5-16k", VICUNA, layout="sharded_bin")
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    assert "hf download lmsys/vicuna-7b-v1.5-16k" in refusal(ModelError, find_checkpoint, "lmsys/vicuna-7b-v1.5-16k")


def test_tokenizer_needs_no_weights(no_network, write):
    directory = cache_snapshot(write, no_network, "lmsys/vicuna-7b-v1.5-16k", VICUNA)
    (directory / "model.safetensors").unlink()
    assert load_tokenizer("vicuna_7b").decode([35, 36]) == "AB"


def test_download_takes_one_weight_format():
    both = {"model.safetensors.index.json", "pytorch_model.bin.index.json", "original/consolidated.00.pth"}
    assert "model*.safetensors" in checkpoints._patterns(both, weights=True)
    assert "pytorch_model*.bin" in checkpoints._patterns({"pytorch_model.bin"}, weights=True)
    assert not any("model*" in pattern for pattern in checkpoints._patterns(both, weights=False))


# ---- what is loaded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded_safetensors", "sharded_bin"])
def test_every_layout_loads_the_written_weights(write, layout, monkeypatch):
    monkeypatch.setattr(checkpoints, "pack_linears", lambda model: None)
    directory = write(VICUNA, layout=layout)
    model = load_target(directory).target
    written = weights_of(VICUNA)
    assert {name for name, _ in model.named_parameters()} == set(written)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, written[name])


@pytest.mark.parametrize("name", FAMILY)
def test_every_family_loads_ready_for_inference(write, name):
    loaded = load_target(write(FAMILY[name]))
    assert loaded.draft is None and loaded.draft_id is None
    assert not loaded.target.training
    assert not any(parameter.requires_grad for parameter in loaded.target.parameters())
    assert loaded.target.config._attn_implementation == "specextend"
    assert loaded.dtype == loaded.target.dtype == torch.float32 and loaded.device.type == "cpu"


@pytest.mark.parametrize("name", FAMILY)
def test_logits_equal_those_of_plain_transformers(write, name):
    directory = write(FAMILY[name])
    tokens = torch.arange(3, 90)[None]
    ours = load_target(directory).target
    ours.set_attn_implementation("sdpa")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
    if name == "longchat_first":
        plain = AutoModelForCausalLM.from_pretrained(write(LONGCHAT_MAIN, "main"), dtype=torch.float32)
    assert torch.equal(ours(tokens).logits, plain(tokens).logits)


def test_attention_gets_no_mask_from_transformers(write):
    """With our attention the forward pass hands queries over and builds no mask, whatever the length."""
    model, masks = load_target(write(VICUNA)).target, []
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    model(torch.arange(3, 40)[None], attend=lambda layer, query, key, value, scaling: query, use_cache=False)
    assert masks == [None]


def test_target_and_draft_may_be_the_same_checkpoint(write):
    directory = str(write(VICUNA))
    loaded = load_models(directory, draft=directory, device="cpu")
    assert loaded.draft is not loaded.target


def test_tied_lm_head_shares_the_embedding(write, monkeypatch):
    monkeypatch.setattr(checkpoints, "pack_linears", lambda model: None)
    model = load_target(write(TIED)).target
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_stored_inv_freq_of_old_files_is_ignored(write, layout):
    wrong = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    model = load_target(write(VICUNA, layout=layout, weights=weights_of(VICUNA) | wrong)).target
    assert torch.allclose(model.model.rotary_emb.inv_freq.double(), plain_inv_freq(VICUNA) / 4)


def test_loading_prints_nothing(write, capfd):
    directory = write(VICUNA)
    (directory / "generation_config.json").write_text(
        json.dumps({"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "transformers_version": "4.31.0"})
    )
    load_models(str(directory), draft=str(write(SMALL_68M, "draft")), device="cpu")
    assert capfd.readouterr() == ("", "")


def test_eos_ids_are_those_of_all_three_places(write):
    directory = write(LLAMA31, eos_token_id=[5, 6])
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert load_target(directory).eos_token_ids == {2, 5, 6, 7}


def test_template_of_an_unknown_model_is_its_tokenizers_own(write):
    directory = write(LLAMA31)
    assert load_target(directory).preset.template is None
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_target(directory).preset.template == "chat"


# ---- dtype and device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, expected", [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp64", torch.float64)]
)
def test_dtype_is_taken_and_runs_while_rope_stays_fp32(write, dtype, expected):
    model = load_target(write(VICUNA), dtype=dtype).target
    assert model.dtype == expected and model.model.rotary_emb.inv_freq.dtype == torch.float32
    model.set_attn_implementation("sdpa")
    assert model(torch.tensor([[1, 5, 9]])).logits.dtype == expected


def test_auto_dtype_is_fp32_on_cpu_and_the_checkpoints_on_gpu(write):
    config = read_config(write(VICUNA))
    assert choose_dtype("auto", config, torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", config, torch.device("cuda", 0)) == torch.float16


def test_unknown_dtype_lists_the_known(write):
    message = refusal(ConfigError, load_target, write(VICUNA), dtype="int4")
    assert "'int4'" in message and "bf16" in message and "auto" in message


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cpu:zero", "mps"])
def test_missing_device_says_what_is_there(device):
    message = refusal(DeviceError, choose_device, device)
    assert repr(device) in message and "cpu" in message


def test_cuda_without_gpu_is_refused_and_auto_is_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "'cuda'" in refusal(DeviceError, choose_device, "cuda")
    assert choose_device("auto") == torch.device("cpu")


def test_dtypes_without_kernels_are_refused_and_auto_avoids_them(write, monkeypatch):
    config, turing = read_config(write(VICUNA)), torch.device("cuda", 0)
    assert "float64 has no attention kernels on a GPU" in refusal(DeviceError, choose_dtype, "fp64", config, turing)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    message = refusal(DeviceError, choose_dtype, "fp16", config, turing)
    assert "float16 needs a GPU of compute capability 8.0, cuda:0 has 7.5" in message
    assert choose_dtype("auto", config, turing) == torch.float32
    assert "'mps' has no kernels here" in refusal(DeviceError, check_placement, torch.float32, torch.device("mps"))


# ---- memory -------------------------------------------------------------------------------------------------------


def test_weight_bytes_counts_every_weight_once(write):
    for name in ("vicuna", "tied"):
        directory = write(FAMILY[name], name)
        stored = sum(weight.numel() for weight in load_file(directory / "model.safetensors").values())
        assert weight_bytes(read_config(directory), torch.float16) == 2 * stored


def test_too_little_memory_is_refused_before_loading(write, monkeypatch):
    monkeypatch.setattr(checkpoints, "available_bytes", lambda device: 1000)
    monkeypatch.setattr("specextend.models.loading.load_causal_lm", None)
    message = refusal(CapacityError, load_target, write(VICUNA))
    assert "GB" in message and "half-precision dtype" in message and "smaller model" in message


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("alloc: not enough memory: 9")]
)
def test_memory_running_out_while_loading_is_a_capacity_error(write, monkeypatch, error):
    def run_out(*_, **__):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", run_out)
    assert "half-precision dtype" in refusal(CapacityError, load_target, write(VICUNA))


# ---- rope and limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, divisor", [(VICUNA, 4), (LONGCHAT_FIRST, 8), (LONGCHAT_MAIN, 8), (SMALL_68M, 1), (TIED, 1)]
)
def test_linear_rope_scales_positions_once(write, config, divisor):
    rotary = load_target(write(config)).target.model.rotary_emb
    assert torch.allclose(rotary.inv_freq.double(), plain_inv_freq(config) / divisor, rtol=1e-6)


def test_llama3_rope_scales_low_frequencies_only(write):
    config = {**LLAMA31, "head_dim": 128}
    rotary = load_target(write(config)).target.model.rotary_emb
    plain = plain_inv_freq(config, 500000.0)
    wavelength = 2 * torch.pi / plain
    smooth = ((8192 / wavelength - 1) / (4 - 1)).clamp(0, 1)
    expected = (1 - smooth) * plain / 8 + smooth * plain
    assert torch.allclose(rotary.inv_freq.double(), expected, rtol=1e-5)
    assert (expected == plain).any() and torch.isclose(expected, plain / 8).any()


def test_dynamic_rope_starts_unscaled_and_grows(write):
    config = {**LLAMA, "max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    loaded = load_target(write(config))
    rotary = loaded.target.model.rotary_emb
    assert loaded.limit == 256
    assert torch.allclose(rotary.inv_freq.double(), plain_inv_freq(config), rtol=1e-6)
    rotary(torch.zeros(1), torch.arange(128)[None])
    base = 10000.0 * (4 * 128 / 64 - 3) ** (8 / 6)
    assert torch.allclose(rotary.inv_freq.double(), plain_inv_freq(config, base), rtol=1e-5)


def test_qwen_and_tied_models_keep_their_base(write):
    assert torch.allclose(
        load_target(write(QWEN3)).target.model.rotary_emb.inv_freq.double(), plain_inv_freq(QWEN3, 1e6), rtol=1e-5
    )


def test_contradicting_rope_is_refused(write):
    directory = write(LONGCHAT_MAIN, rope_scaling={"type": "linear", "factor": 4.0})
    message = refusal(ModelError, load_target, directory)
    assert "rope_condense_ratio 8" in message and "4.0" in message


def test_unknown_rope_type_is_refused(write):
    directory = write(LLAMA, rope_scaling={"type": "spiral", "factor": 4.0})
    message = refusal(ModelError, load_target, directory)
    assert "'spiral'" in message and "llama3" in message


BUNDLED_LIKE = {**LLAMA, "max_position_embeddings": 16384, "rope_scaling": {"type": "linear", "factor": 4.0}}
CONDENSED_ONLY = {key: value for key, value in LONGCHAT_FIRST.items() if key != "max_sequence_length"}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "config, limit",
    [
        (VICUNA, 16384),
        (LONGCHAT_FIRST, 16384),
        (LONGCHAT_MAIN, 16384),
        (CONDENSED_ONLY, 16384),
        (BUNDLED_LIKE, 16384),
        (SMALL_68M, 2048),
        (LLAMA31, 131072),
        (QWEN2, 32768),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 2}, 32768),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 1}, 4096),
        ({**QWEN2, "rope_scaling": YARN}, 131072),
        (MISTRAL, 32768),
        ({**MISTRAL, "sliding_window": 4096}, 4096),
    ],
)
def test_position_limit(write, config, limit):
    assert position_limit(read_config(write(config))) == limit


# ---- broken checkpoints -------------------------------------------------------------------------------------------


def test_missing_and_unexpected_keys_are_named(write):
    weights = weights_of(VICUNA)
    weights["model.layers.0.surprise.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    message = refusal(ModelError, load_target, write(VICUNA, weights=weights))
    assert "missing (model.layers.1.mlp.up_proj.weight)" in message
    assert "unexpected (model.layers.0.surprise.weight)" in message


def test_many_missing_keys_are_abbreviated(write):
    weights = {name: weight for name, weight in weights_of(VICUNA).items() if "layers.1" not in name}
    message = refusal(ModelError, load_target, write(VICUNA, weights=weights))
    assert "9 weights are missing" in message and "…" in message


def test_missing_lm_head_is_an_error_unless_tied(write):
    weights = {name: weight for name, weight in weights_of(VICUNA).items() if name != "lm_head.weight"}
    assert "lm_head.weight" in refusal(ModelError, load_target, write(VICUNA, weights=weights))


def test_wrong_shape_is_named(write):
    weights = weights_of(VICUNA) | {"model.norm.weight": torch.ones(7)}
    message = refusal(ModelError, load_target, write(VICUNA, weights=weights))
    assert "model.norm.weight [7] instead of [32]" in message


@pytest.mark.parametrize("layout, file", [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")])
@pytest.mark.parametrize("kept", ["half", "nothing", "pointer"])
def test_corrupt_weights_are_one_line(write, layout, file, kept):
    path = write(VICUNA, layout=layout) / file
    content = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    path.write_bytes({"half": content[: len(content) // 2], "nothing": b"", "pointer": pointer}[kept])
    message = refusal(ModelError, load_target, path.parent)
    assert str(path.parent) in message and "download them again" in message


def test_pickle_with_code_is_not_run(write):
    directory = write(VICUNA, layout="bin")
    torch.save({"model.norm.weight": Path}, directory / "pytorch_model.bin")
    message = refusal(ModelError, load_target, directory)
    assert str(directory) in message and "more than tensors" in message and "weights_only" not in message


def test_missing_shard_is_named(write):
    directory = write(VICUNA, layout="sharded_safetensors")
    (directory / "model-00002-of-00002.safetensors").unlink()
    assert "1 of 2 weight files (model-00002-of-00002.safetensors)" in refusal(ModelError, load_target, directory)


def test_directory_without_weights_config_or_tokenizer_says_so(write):
    directory = write(VICUNA)
    for file, said in (
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
        ("config.json", "no config.json"),
    ):
        (directory / file).unlink()
        message = refusal(ModelError, load_target, directory)
        assert said in message and str(directory) in message


def test_sentencepiece_tokenizer_without_the_package_names_it(write, monkeypatch):
    directory = write(VICUNA)
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    monkeypatch.setattr(checkpoints, "is_sentencepiece_available", lambda: False)
    assert "pip install sentencepiece protobuf" in refusal(ModelError, load_target, directory)


def test_broken_tokenizer_is_one_line(write):
    directory = write(VICUNA)
    (directory / "tokenizer.json").write_text('{"version": "1.0"')
    assert "tokenizer in" in refusal(ModelError, load_target, directory)


@pytest.mark.parametrize("content", ["{not json", "[1]", "", '\x00\x01{"'])
def test_config_that_is_no_json_object_is_one_line(write, content):
    directory = write(VICUNA)
    (directory / "config.json").write_text(content)
    assert str(directory / "config.json") in refusal(ModelError, load_target, directory)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "big"},
        {"hidden_size": 33},
        {"num_attention_heads": 0},
        {"rope_scaling": {"type": "linear"}},
        {"rope_scaling": "linear"},
    ],
)
def test_invalid_config_is_one_line(write, change):
    directory = write(VICUNA)
    (directory / "config.json").write_text(json.dumps({**VICUNA, **change}))
    assert "not a valid model config" in refusal(ModelError, load_target, directory)


@pytest.mark.parametrize(
    "change, given",
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"architectures": None, "model_type": None}, "None"),
    ],
)
def test_other_architectures_are_refused(write, change, given):
    message = refusal(ModelError, load_target, write(VICUNA, **change))
    assert given in message and "LlamaForCausalLM" in message and "Qwen3ForCausalLM" in message


def test_quantized_checkpoint_is_refused(write):
    directory = write(VICUNA, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantized" in refusal(ModelError, load_target, directory)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_act": "swoosh"}, "the activation 'swoosh'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
         "rope type 'longrope'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized"),
        ({"num_hidden_layers": "two"}, "config"),
    ],
)  # fmt: skip
def test_configs_our_models_do_not_compute_are_one_line(write, change, said):
    directory = write(VICUNA)
    (directory / "config.json").write_text(json.dumps({**VICUNA, **change}))
    assert said in refusal(ModelError, load_target, directory)


def test_check_supported_takes_a_config_from_anywhere(write):
    config = read_config(write(VICUNA))
    check_supported(config)
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 10000.0}
    assert "the draft has rope type 'longrope'" in refusal(ModelError, check_supported, config, "the draft")
    other = GPT2Config(architectures=["GPT2LMHeadModel"])
    assert "the model is a GPT2LMHeadModel; supported are" in refusal(ModelError, check_supported, other)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}, {"weight_map": {"a": "../b"}}]
)
def test_malformed_index_of_shards_is_one_line(write, index):
    directory = write(VICUNA, layout="sharded_safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json has no weight_map" in refusal(ModelError, load_target, directory)


@pytest.mark.parametrize("name", ["~nouser/x", "x" * 300, "a/" + "x" * 300, "a\0b", "~nouser"])
def test_paths_that_cannot_be_are_one_line(name, no_network):
    refusal(ModelError, load_models, name)
    refusal(ModelError, find_checkpoint, name)


def test_folder_that_may_not_be_read_is_one_line(write, monkeypatch):
    directory = write(VICUNA)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "check the folder's permissions" in refusal(ModelError, load_target, directory)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(write, layout, value):
    weights = weights_of(VICUNA)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    message = refusal(ModelError, load_target, write(VICUNA, weights=weights, layout=layout))
    assert "1 weights hold NaN or infinity in float32 (model.layers.1.mlp.up_proj.weight)" in message


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_integer_weights_are_refused(write, layout):
    weights = weights_of(VICUNA)
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    message = refusal(ModelError, load_target, write(VICUNA, weights=weights, layout=layout))
    assert "(model.layers.1.mlp.up_proj.weight): it is quantized" in message


@pytest.mark.parametrize("content", ["{not json", "[1]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, null]}'])
def test_corrupt_generation_config_is_one_line_and_loses_no_eos_id(write, content):
    directory = write(VICUNA)
    (directory / "generation_config.json").write_text(content)
    assert "generation_config.json" in refusal(ModelError, load_target, directory)


# ---- target and draft ---------------------------------------------------------------------------------------------


def test_padded_vocabularies_with_equal_tokens_agree(write):
    target, draft = write(QWEN2, "target", vocab_size=128), write(QWEN2, "draft", vocab_size=112)
    assert load_models(str(target), draft=str(draft), device="cpu").vocab_size == 112


def test_different_tokens_for_one_id_are_refused_with_an_example(write):
    target, draft = write(VICUNA, "target"), write(SMALL_68M, "draft")
    write_tokenizer(draft, ["<unk>", "<s>", "</s>", *map(chr, range(125, 32, -1))])
    message = refusal(ModelError, load_models, str(target), draft=str(draft))
    assert "id 3 is '!' for the target and '}' for the draft" in message


def test_renamed_control_tokens_do_not_matter(write):
    target, draft = write(VICUNA, "target"), write(SMALL_68M, "draft")
    write_tokenizer(draft, ["<unk>", "<begin>", "<end>", *map(chr, range(33, 126))])
    assert load_models(str(target), draft=str(draft), device="cpu").vocab_size == 96


def test_draft_without_tokenizer_must_have_the_targets_size(write):
    target = str(write(VICUNA, "target", vocab_size=128))
    for size in (128, 112):
        draft = write(SMALL_68M, f"draft{size}", vocab_size=size)
        (draft / "tokenizer.json").unlink()
    assert load_models(target, draft=str(draft.parent / "draft128"), device="cpu").vocab_size == 128
    message = refusal(ModelError, load_models, target, draft=str(draft))
    assert "128" in message and "112" in message


def test_draft_vocabulary_smaller_than_the_tokenizer_is_refused(write):
    target, draft = write(VICUNA, "target"), write(SMALL_68M, "draft", vocab_size=64)
    message = refusal(ModelError, load_models, str(target), draft=str(draft))
    assert "(64)" in message and "(96)" in message


def test_broken_draft_is_named(write):
    target, draft = write(VICUNA, "target"), write(SMALL_68M, "draft")
    (draft / "model.safetensors").write_bytes(b"")
    assert str(draft) in refusal(ModelError, load_models, str(target), draft=str(draft))


def test_unknown_draft_is_named(write, no_network):
    target = str(write(VICUNA))
    assert "'nothing-here'" in refusal(ModelError, load_models, target, draft="nothing-here")
    assert "hf download org/draft" in refusal(ModelError, load_models, target, draft="org/draft")


# ---- the bundled pair ---------------------------------------------------------------------------------------------


def test_bundled_pair_loads_without_network(no_network):
    """Fails, and must, where the weights are not there: the project ships them."""
    loaded = load_models("bundled", device="cpu")
    assert loaded.limit == 16384 and loaded.draft is not None and loaded.eos_token_ids
    assert (loaded.target_id, loaded.draft_id) == ("bundled/target", "bundled/draft")
    assert loaded.vocab_size == loaded.target.config.vocab_size == loaded.draft.config.vocab_size
    text = "The quick brown fox."
    assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids, skip_special_tokens=True) == text
