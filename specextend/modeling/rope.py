"""Rotary position embeddings, with each model's own parameters (default, linear, llama3, yarn, dynamic).

Drafts rotate here because their positions change when chunks are gathered; targets are rotated by transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rope:
    """cos and sin of a model's rotary embedding, tabulated; rotates keys and queries the model left un-rotated.

    Args:
        rotary: the model's own `rotary_emb` module.
    """

    def __init__(self, rotary: nn.Module, dtype: torch.dtype, device: torch.device):
        self._rotary = rotary
        self._options = {"dtype": dtype, "device": device}
        self._cos = self._sin = torch.empty(0)

    def rotate(self, states: Tensor, start: int, *, same: bool = False) -> Tensor:
        """Rotate `states` [..., T, D] to positions start, start + 1, ..., or all of them to `start` (a tree level)."""
        end = start + (1 if same else states.shape[-2])
        self._reserve(max(end, 1))  # an empty row, too, has a head dim
        half = states.shape[-1] // 2
        swapped = torch.cat((states[..., half:], states[..., :half]), -1)
        return torch.addcmul(states * self._cos[start:end], swapped, self._sin[start:end])

    def rotate_pair(self, query: Tensor, key: Tensor, start: int, *, same: bool = False) -> tuple[Tensor, Tensor]:
        return self.rotate(query, start, same=same), self.rotate(key, start, same=same)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [>= length, D], the sign of rotate-half folded into sin."""
        self._reserve(length)
        return self._cos, self._sin

    def _reserve(self, length: int) -> None:
        """Tabulate positions 0..length-1, [S, D] each; the sign of rotate-half is folded into sin."""
        if length <= self._cos.shape[0]:
            return
        length = max(length, 2 * self._cos.shape[0], 2048)
        positions = torch.arange(length, device=self._options["device"])[None]
        cos, sin = self._rotary(torch.empty(0, dtype=torch.float32, device=self._options["device"]), positions)
        cos, sin = cos[0], sin[0]
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[:, :half], sin[:, half:]), -1)
        self._cos, self._sin = cos.to(**self._options), sin.to(**self._options)


class DynamicRope(nn.Module):
    """Dynamic NTK rope with each token's frequencies from its own position.

    transformers takes them from the newest position of the forward pass, so a tree node would be rotated differently
    when a deeper node is verified beside it, and the output would not be the target's. Here a token at position p gets
    what step-by-step decoding gives it: the base for p + 1 tokens, or for the whole prompt inside the prompt.

    Args:
        rotary: the model's `rotary_emb` of type "dynamic", which this module replaces.
    """

    def __init__(self, rotary: nn.Module):
        super().__init__()
        config = rotary.config
        self._dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._base = config.rope_parameters["rope_theta"]
        self._factor = config.rope_parameters["factor"]
        self._trained = config.max_position_embeddings
        self.attention_scaling = rotary.attention_scaling
        self.prompt_length = 0

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, D] in x's dtype for `position_ids` [B, T]."""
        tokens = (position_ids + 1).clamp(min=max(self.prompt_length, self._trained)).double()
        growth = self._factor * tokens / self._trained - (self._factor - 1)
        base = self._base * growth ** (self._dim / (self._dim - 2))
        exponent = torch.arange(0, self._dim, 2, device=x.device, dtype=torch.double) / self._dim
        angles = position_ids[..., None].float() * (base[..., None] ** -exponent).float()
        angles = torch.cat((angles, angles), dim=-1)
        return (
            (angles.cos() * self.attention_scaling).to(x.dtype),
            (angles.sin() * self.attention_scaling).to(x.dtype),
        )


def make_exact(model: nn.Module) -> None:
    """Replace a rotary embedding whose frequencies depend on the batch of positions; other models stay as they are."""
    decoder = model.get_decoder()
    if getattr(decoder.rotary_emb, "rope_type", "default") == "dynamic":
        decoder.rotary_emb = DynamicRope(decoder.rotary_emb)
