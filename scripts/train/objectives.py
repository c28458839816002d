"""What the target and the draft minimise, and what tells during training whether it works."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from scripts.train.models import last_hidden, token_losses
from scripts.train.rows import LOOPED, PLAIN


def loop_avoiding_loss(losses: Tensor, kinds: Tensor, weight: float) -> Tensor:
    """Cross-entropy on plain tokens, `weight` times the unlikelihood -log(1 - p) on looped ones; a mean over all.

    Args:
        losses: [B, T] cross-entropy -log p of each token, float32.
        kinds: [B, T] PLAIN, SILENT or LOOPED.
    """
    # Shifted, not clamped: a clamp would stop the gradient exactly where the model is sure of the loop.
    unlikelihood = -torch.log(-torch.expm1(-(losses + 1e-4)))
    return ((kinds == PLAIN) * losses + weight * (kinds == LOOPED) * unlikelihood).mean()


def target_objective(model: LlamaForCausalLM, weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of `tokens` [B, T + 1] with `kinds` [B, T + 1]."""

    def loss(tokens: Tensor, kinds: Tensor) -> Tensor:
        return loop_avoiding_loss(token_losses(model, tokens), kinds[:, 1:], weight)

    return loss


def draft_objective(
    draft: LlamaForCausalLM, target: LlamaForCausalLM, temperature: float
) -> Callable[[Tensor], Tensor]:
    """Forward KL from the target's distribution at `temperature` to the draft's, everywhere in `tokens` [B, T]."""

    def loss(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(target.lm_head(last_hidden(target, tokens)).float() / temperature, dim=-1)
        drafted = F.log_softmax(draft.lm_head(last_hidden(draft, tokens)).float(), dim=-1)
        return (wanted.exp() * (wanted - drafted)).sum(-1).mean()

    return loss


def validation_loss(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Mean cross-entropy over `windows` [n, T + 1], one at a time."""
    return torch.stack([token_losses(model, window[None]).mean() for window in windows]).mean().item()


def validation_agreement(draft: LlamaForCausalLM, target: LlamaForCausalLM, rows: Tensor) -> dict[str, float]:
    """KL and share of equal argmaxes over `rows` [n, T], a few rows at a time."""
    divergences, equal = [], []
    for part in rows.split(8):
        wanted = F.log_softmax(target.lm_head(last_hidden(target, part)).float(), dim=-1)
        drafted = F.log_softmax(draft.lm_head(last_hidden(draft, part)).float(), dim=-1)
        divergences.append((wanted.exp() * (wanted - drafted)).sum(-1).mean())
        equal.append((wanted.argmax(-1) == drafted.argmax(-1)).float().mean())
    return {"kl": torch.stack(divergences).mean().item(), "same_argmax": torch.stack(equal).mean().item()}
