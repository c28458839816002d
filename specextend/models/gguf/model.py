"""The model in a GGUF file: its config and its weights under transformers' names."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from specextend.errors import ModelError
from specextend.models.gguf.file import GgufFile

# llama.cpp writes Mistral models as llama, too: they are the same but for a window that no file names.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
PERMUTED = ("llama",)  # its rows of queries and keys are in the order of rotations by pairs
INNER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's and 3.2's rope, as factors of wavelengths
LLAMA3_FACTORS = (8.0, 32.0)


def read_config(file: GgufFile) -> PreTrainedConfig:
    """The transformers config of the file's model."""
    architecture = file["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise ModelError(f"{file.path} is a {architecture}; supported in GGUF are {', '.join(ARCHITECTURES)}")

    def number(key: str, default: float | None = None) -> float:
        value = file.metadata.get(f"{architecture}.{key}", default)
        value = file[f"{architecture}.{key}"] if value is None else value
        if not isinstance(value, (int, float)) or not value > 0:
            raise ModelError(f"{file.path}: {architecture}.{key} is {value!r}; it must be a positive number")
        return value if isinstance(value, int) else float(str(np.float32(value)))  # 1e-05, not 9.999999747378752e-06

    if "token_embd.weight" not in file.tensors:
        raise ModelError(f"{file.path} has no token_embd.weight; it is not a whole language model")
    hidden, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", hidden // heads)
    if number("rope.dimension_count", head_dim) != head_dim:
        raise ModelError(f"{file.path} rotates a part of each head only, which is not supported")
    biased = "blk.0.attn_q.bias" in file.tensors
    context = number("context_length")
    return AutoConfig.for_model(
        architecture,
        hidden_size=hidden,
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope(file, architecture, number("rope.freq_base", 10000.0), head_dim, context),
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=file.metadata.get("tokenizer.ggml.padding_token_id"),
        dtype=_dtype(file),
        **({"attention_bias": biased} if architecture == "llama" else {}),
    )


def read_weights(file: GgufFile, config: PreTrainedConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of each tensor, one after the other; a name that we do not know stays as it is."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name in file.tensors:
        if name == ROPE_FACTORS:
            continue
        weight = file.weight(name)
        part = name.split(".")[-2] if "." in name else name
        if config.model_type in PERMUTED and part in heads:
            if len(weight) != heads[part] * config.head_dim:
                raise ModelError(f"{file.path}: {name} has {len(weight)} rows for {heads[part]} heads")
            weight = unpermuted(weight, heads[part])
        yield hf_name(name), weight.to(dtype)


def hf_name(name: str) -> str:
    """transformers' name of a tensor: blk.0.attn_q.weight is model.layers.0.self_attn.q_proj.weight."""
    match name.split("."):
        case ["blk", layer, part, kind] if part in INNER:
            return f"model.layers.{layer}.{INNER[part]}.{kind}"
        case [part, kind] if part in OUTER:
            return f"{OUTER[part]}.{kind}"
    return name


def unpermuted(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp interleaves the two halves of a head that a rotation mixes; transformers keeps them apart."""
    return weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _rope(file: GgufFile, architecture: str, theta: float, head_dim: int, context: int) -> dict:
    if ROPE_FACTORS in file.tensors:
        return _llama3_rope(file, theta, head_dim)
    scaling = file.metadata.get(f"{architecture}.rope.scaling.type", "none")
    factor = file.metadata.get(f"{architecture}.rope.scaling.factor", 1.0)
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if scaling == "yarn":
        original = file[f"{architecture}.rope.scaling.original_context_length"]
        return {
            "rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original
        }  # fmt: skip
    raise ModelError(f"{file.path} has rope scaling {scaling!r}; supported are none, linear and yarn")


def _llama3_rope(file: GgufFile, theta: float, head_dim: int) -> dict:
    """The rope whose factors the file stores; it does not say how they were made, so the known ones are tried."""
    stored = file.weight(ROPE_FACTORS)
    for factor in LLAMA3_FACTORS:
        rope = {
            "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
        expected = llama3_factors(rope, head_dim)
        if stored.shape == expected.shape and torch.allclose(stored, expected, rtol=1e-3):
            return rope
    raise ModelError(f"{file.path} has rope factors that are not Llama 3.1's or 3.2's; use the model's own checkpoint")


def llama3_factors(rope: dict, head_dim: int) -> Tensor:
    """What wavelengths are multiplied by, [head_dim / 2]: 1 for short ones, `factor` for long ones."""
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def _dtype(file: GgufFile) -> torch.dtype:
    """What the weights were: float32 only if all are, as norms are float32 in every file."""
    kinds = {tensor.type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if "BF16" in kinds:
        return torch.bfloat16
    return torch.float32 if kinds == {"F32"} else torch.float16
