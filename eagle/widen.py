"""EAGLE heads widened to the shape of a large target, see `specextend.models.widen`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from eagle.drafter import EagleDrafter
from eagle.heads import Eagle1Head, Eagle3Head, Head
from specextend.models import widen as small_lm
from specextend.models.loading import LoadedModels
from specextend.models.widen import (
    PAIRS,
    STD,
    live_layers,
    wide_epsilon,
    widen_attention,
    widen_mlp,
    widen_norm,
    widen_readout,
)


def widened(models: LoadedModels, shape: str, *, dtype: str = "auto") -> LoadedModels:
    """As `specextend.models.widen.widened`, for a target with an EAGLE head."""
    wide = small_lm.widened(models, shape, dtype=dtype)
    with torch.inference_mode():
        head = widen_head(models.draft, models.target, wide.target, draft_vocab=PAIRS[shape].draft_vocab)
    return replace(
        wide,
        draft=head,
        drafter=partial(EagleDrafter, target=wide.target),
        draft_id=f"{models.draft_id} widened to {shape}",
    )


def widen_head(head: Head, target: PreTrainedModel, wide: PreTrainedModel, *, draft_vocab: int, seed: int = 0) -> Head:
    """`head` of `target` as a head of `wide`, the same target widened; on its device, in its dtype.

    Args:
        draft_vocab: size of an EAGLE-3 head's vocabulary; ids beyond its own take no probability.
    """
    config = _wide_config(head.config, wide.config)
    spare = head.config.hidden_size
    with torch.device(wide.device):
        if isinstance(head, Eagle1Head):
            new: Head = Eagle1Head(config, wide.get_input_embeddings(), wide.get_output_embeddings(), bias=False)
        else:
            layers = [*live_layers(target.config.num_hidden_layers, wide.config.num_hidden_layers)]
            layers.append(wide.config.num_hidden_layers)  # what enters the final norm
            entering = [layers[layer] for layer in head.entering]
            new = Eagle3Head(config, wide.get_input_embeddings(), entering, _more_ids(head, wide, draft_vocab))
    new = new.to(wide.dtype).requires_grad_(False).eval()
    own = [weight for name, weight in new.named_parameters() if not name.startswith("embed_tokens.")]
    generator = torch.Generator(wide.device).manual_seed(seed)
    for weight in own:
        if weight.ndim == 2 and weight is not wide.get_output_embeddings().weight:
            weight.normal_(0.0, STD, generator=generator)

    _widen_fc(new.fc, head.fc, spare)
    block, small = new.layers[0], head.layers[0]
    widen_norm(block.post_attention_layernorm, small.post_attention_layernorm)
    widen_mlp(block.mlp, small.mlp)
    if isinstance(head, Eagle1Head):
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            projection.weight[:, spare] = 0.0  # no norm stands between the spare dimension and them
        widen_attention(block.self_attn, small.self_attn, head.config)
    else:
        widen_norm(block.input_layernorm, small.input_layernorm)
        widen_norm(block.hidden_norm, small.hidden_norm)
        widen_attention(block.self_attn, small.self_attn, head.config, blocks=2)
        widen_norm(new.norm, head.norm)
        new.norm.weight[spare] = 1.0
        widen_readout(new.lm_head, head.lm_head.weight, spare)
    return new


def _wide_config(small: LlamaConfig, wide: LlamaConfig) -> LlamaConfig:
    config = LlamaConfig(
        **{
            name: getattr(wide, name)
            for name in (
                "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                "vocab_size",
            )
        },
        num_hidden_layers=1,
        max_position_embeddings=small.max_position_embeddings,
        rope_parameters=dict(small.rope_parameters),
        rms_norm_eps=wide_epsilon(small, wide.hidden_size),
    )  # fmt: skip
    config._attn_implementation = wide._attn_implementation
    return config


def _widen_fc(wide: nn.Linear, small: nn.Linear, spare: int) -> None:
    """Copy block by block; the spare dimension of the first block's constant goes through, that of others nowhere."""
    blocks = small.in_features // small.out_features
    wide.weight.zero_()
    for wide_block, small_block in zip(wide.weight.chunk(blocks, 1), small.weight.chunk(blocks, 1), strict=True):
        wide_block[:spare, :spare] = small_block.to(wide_block)
    wide.weight[spare, spare] = 1.0


def _more_ids(head: Eagle3Head, wide: PreTrainedModel, draft_vocab: int) -> torch.Tensor:
    """The head's target ids, then ids it does not know, up to `draft_vocab` of them."""
    device = wide.device
    own = torch.arange(head.config.vocab_size, device=device) if head.target_ids is None else head.target_ids.to(device)
    known = torch.zeros(wide.config.vocab_size, dtype=torch.bool, device=device)
    known[own] = True
    return torch.cat((own, (~known).nonzero()[: draft_vocab - len(own), 0]))
