"""The two models: unmodified Hugging Face Llamas, a registered causal attention, saving in bfloat16."""

import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from scripts.train.corpus import BOS_ID, EOS_ID
from scripts.train.settings import Settings, TrainingError
from specextend.modeling.packed import PackedLinear
from specextend.models.loading import LoadedModels, load_models

# Not known to transformers' mask interface, so the model builds no mask; right only for whole rows without a cache.
CAUSAL = "bundled_causal"
CACHED = "bundled_cached"
ENDS = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=0)


def causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention over [B, H, T, D]; returns [B, T, H, D]. Under autocast rotation left q and k in float32."""
    assert attention_mask is None, f"{CAUSAL} takes whole rows, without padding"
    output = F.scaled_dot_product_attention(
        query.to(value.dtype), key.to(value.dtype), value, is_causal=True, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2).contiguous(), None


def cached_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """Attention through the `cache` the model was called with (`generation.BatchCache`); returns [B, T, H, D]."""
    output = kwargs["cache"].attend(module.layer_idx, query, key, value, kwargs["scaling"])
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(CAUSAL, causal_attention)
AttentionInterface.register(CACHED, cached_attention)


def target_config(settings: Settings) -> LlamaConfig:
    """Linear RoPE scaling by 4, as in vicuna-7b-v1.5-16k."""
    return _config(
        settings,
        settings.long_context,
        (settings.target_hidden, settings.target_layers, settings.target_heads, settings.target_ffn),
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    )


def draft_config(settings: Settings) -> LlamaConfig:
    """No RoPE scaling: a model of short contexts."""
    return _config(
        settings,
        settings.draft_context,
        (settings.draft_hidden, settings.draft_layers, settings.draft_heads, settings.draft_ffn),
        {"rope_type": "default", "rope_theta": 10000.0},
    )


def _config(settings: Settings, positions: int, sizes: tuple[int, int, int, int], rope: dict) -> LlamaConfig:
    hidden, layers, heads, ffn = sizes
    return LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=ffn,
        max_position_embeddings=positions,
        rope_parameters=rope,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
    )


def new_model(config: LlamaConfig, device: torch.device, seed: int) -> LlamaForCausalLM:
    """Random float32 weights; what writes to the residual stream starts smaller the deeper the model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=CAUSAL, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.div_((2 * config.num_hidden_layers) ** 0.5)
    return model.to(device)


def lengthened(model: PreTrainedModel, positions: int) -> LlamaForCausalLM:
    """A copy of `model` in float32 with room for `positions`, to be trained on: its linear RoPE grows with them."""
    config, rope = model.config, model.config.rope_parameters
    if config.model_type != "llama" or rope["rope_type"] not in ("default", "linear"):
        kind = f"{config.model_type} with {rope['rope_type']} RoPE"
        raise TrainingError(f"the target is a {kind}; --what longer takes Llamas with plain or linear RoPE")
    if positions <= config.max_position_embeddings:
        raise TrainingError(
            f"--long_context {positions} must exceed the {config.max_position_embeddings} positions of the target"
        )
    factor = rope.get("factor", 1.0) * positions / config.max_position_embeddings
    longer = LlamaConfig(**_plain(config))
    longer.max_position_embeddings = positions
    longer.rope_parameters = rope | {"rope_type": "linear", "factor": factor}
    copy = AutoModelForCausalLM.from_config(longer, attn_implementation=CAUSAL, dtype=torch.float32)
    copy.load_state_dict(model.state_dict())
    return copy.to(model.device)


def load_model(
    folder: Path, device: torch.device, *, attention: str = CAUSAL, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A saved model, frozen; `attention=CACHED` for writing text."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype)
    return model.to(device).eval().requires_grad_(False)


def load_any_target(name: str, device: torch.device, *, attention: str) -> LoadedModels:
    """Any target that can be decoded with, frozen; on a GPU in its own dtype, on a CPU in float32."""
    loaded = load_models(name, device=str(device), with_draft=False)
    for module in list(loaded.target.modules()):
        for part, child in module.named_children():
            if isinstance(child, PackedLinear):
                setattr(module, part, child.unpacked())
    loaded.target.requires_grad_(False).config._attn_implementation = attention
    return loaded


def save_model(model: LlamaForCausalLM, tokenizer: Path, folder: Path, ends: GenerationConfig = ENDS) -> None:
    """Weights rounded to bfloat16, config and tokenizer, as plain `from_pretrained` reads them.

    Args:
        ends: names the tokens that begin and end a text.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    rounded = LlamaForCausalLM(LlamaConfig(**_plain(model.config))).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = ends
    rounded.save_pretrained(partial)
    for file in tokenizer.iterdir():
        shutil.copy(file, partial / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _plain(config: LlamaConfig) -> dict:
    return {name: value for name, value in config.to_diff_dict().items() if not name.startswith("_")}


def last_hidden(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Final hidden states [B, T, hidden] of whole rows `tokens` [B, T]."""
    return model.model(input_ids=tokens, use_cache=False).last_hidden_state


def token_losses(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Cross-entropy [B, T] float32 of each token of `tokens` [B, T + 1] after the first."""
    logits = model.lm_head(last_hidden(model, tokens[:, :-1])).float()
    labels = tokens[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
