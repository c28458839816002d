"""The EAGLE heads: one transformer block that continues the target's hidden states (Li et al., 2024; 2025).

Both read pairs: the embedding of a token and the state of the token before it. For committed tokens the state comes
from the target's features; within a draft tree it is the head's own output for the parent. Attention, MLP and norms
are transformers' Llama modules; parameter names are those of the published checkpoints (EAGLE-3's `midlayer` is
`layers.0`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)


class Head(nn.Module):
    """What the two heads share.

    Attributes:
        entering: layers of the target whose input is a feature; None: the target's final hidden state is.
        target_ids: [V_draft] target id of every draft id, int64; None where the vocabularies are the same.
    """

    entering: tuple[int, ...] | None
    target_ids: Tensor | None

    def __init__(self, config: LlamaConfig, embed_tokens: nn.Embedding):
        super().__init__()
        self.config = config
        self.embed_tokens = embed_tokens
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def states(self, features: Tensor) -> Tensor:
        """What the block takes, [..., H], of the target's `features` [..., F]."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, states: Tensor, rotation: tuple[Tensor, Tensor], **attention) -> Tensor:
        """The block's output [B, T, H], which is the state of the tokens drafted next.

        Args:
            tokens: [B, T]; states: [B, T, H] of the tokens before them.
            rotation: cos and sin [B, T, D] of the pairs' positions; pair i is token i + 1 with the state of token i.
            attention: handed to the attention function, as `attend`.
        """
        raise NotImplementedError

    def keys_and_values(self, tokens: Tensor, states: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values [B, H_kv, T, D] of pairs; a single block's need no attention."""
        entry, attention = self.attention_input(tokens, states), self.layers[0].self_attn
        shape = (*entry.shape[:-1], -1, attention.head_dim)
        key = attention.k_proj(entry).view(shape).transpose(1, 2)
        value = attention.v_proj(entry).view(shape).transpose(1, 2)
        return apply_rotary_pos_emb(key, key, *rotation)[1], value

    def attention_input(self, tokens: Tensor, states: Tensor) -> Tensor:
        """What the query, key and value projections read."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V_draft] of the token after each block output [..., H]."""
        raise NotImplementedError


class Eagle1Head(Head):
    """EAGLE-1: `fc` mixes embedding and state, a block without input norm follows; the target's LM head reads it.

    Args:
        embed_tokens, lm_head: the target's, or those stored with the head.
        bias: whether `fc` has one.
    """

    entering = None
    target_ids = None

    def __init__(self, config: LlamaConfig, embed_tokens: nn.Embedding, lm_head: nn.Linear, *, bias: bool):
        super().__init__(config, embed_tokens)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=bias)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, layer_idx=0)])
        self.layers[0].input_layernorm = nn.Identity()
        self.lm_head = lm_head

    def states(self, features: Tensor) -> Tensor:
        return features

    def forward(self, tokens, states, rotation, **attention):
        return self.layers[0](self.attention_input(tokens, states), position_embeddings=rotation, **attention)

    def attention_input(self, tokens: Tensor, states: Tensor) -> Tensor:
        return self.fc(torch.cat((self.embed_tokens(tokens), states), dim=-1))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


class Eagle3Head(Head):
    """EAGLE-3: three of the target's layers as features, attention over [embedding, state], a vocabulary of its own.

    Args:
        entering: layers of the target whose inputs are concatenated to the features, low to high.
        target_ids: see `Head`; its length is the draft's vocabulary.
        norm_before_residual: the residual branch takes the state after `hidden_norm` (a speculators option).
    """

    def __init__(
        self,
        config: LlamaConfig,
        embed_tokens: nn.Embedding,
        entering: Sequence[int],
        target_ids: Tensor | None,
        *,
        norm_before_residual: bool = False,
    ):
        super().__init__(config, embed_tokens)
        hidden = config.hidden_size
        draft_vocab = config.vocab_size if target_ids is None else len(target_ids)
        self.entering = tuple(entering)
        self.fc = nn.Linear(len(self.entering) * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([Eagle3Block(config, norm_before_residual)])
        self.norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, draft_vocab, bias=False)
        self.register_buffer("target_ids", target_ids, persistent=False)

    def states(self, features: Tensor) -> Tensor:
        return self.fc(features)

    def forward(self, tokens, states, rotation, **attention):
        return self.layers[0](self.embed_tokens(tokens), states, rotation, **attention)

    def attention_input(self, tokens: Tensor, states: Tensor) -> Tensor:
        return self.layers[0].attention_input(self.embed_tokens(tokens), states)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.norm(hidden))


class Eagle3Block(nn.Module):
    """A Llama block whose query, key and value read embedding and state side by side, each normed on its own."""

    def __init__(self, config: LlamaConfig, norm_before_residual: bool):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = LlamaAttention(config, layer_idx=0)
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            wide = nn.Linear(2 * hidden, narrow.out_features, bias=narrow.bias is not None)
            setattr(self.self_attn, name, wide)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(hidden, eps=eps)
        self.hidden_norm = LlamaRMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = LlamaRMSNorm(hidden, eps=eps)
        self.norm_before_residual = norm_before_residual

    def attention_input(self, embedding: Tensor, states: Tensor) -> Tensor:
        return torch.cat((self.input_layernorm(embedding), self.hidden_norm(states)), dim=-1)

    def forward(self, embedding: Tensor, states: Tensor, rotation: tuple[Tensor, Tensor], **attention) -> Tensor:
        entry = self.attention_input(embedding, states)
        residual = entry[..., embedding.shape[-1] :] if self.norm_before_residual else states
        attended, _ = self.self_attn(entry, position_embeddings=rotation, attention_mask=None, **attention)
        hidden = residual + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))
