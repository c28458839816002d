"""EAGLE heads of the target: what they are trained on, and EAGLE-3's training-time test (Li et al., 2025).

A head reads pairs (token i + 1, state of token i). In the training-time test its own outputs become the states of the
next step, as they do from level to level of a draft tree, and the loss is taken at every step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from eagle.heads import Eagle1Head, Eagle3Head, Head
from training.settings import Settings

UNROLLED = "bundled_unrolled"
STEP_WEIGHT = 0.8  # of a step's loss against the step before it
FEATURE_NOISE = 0.1  # of EAGLE-1's input, in units of its root mean square: at depth its states are its own, imperfect
INITIAL_STD = 0.02


class Unrolled:
    """Attention through the steps of a training-time test, one call per step; doubles as the model's attention.

    At step k the pair at index i sees the pairs up to i - k as step 0 made them, then one pair of each step after:
    indices i - k + 1 .. i, its own chain.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """[B, H, T, D] for `query` [B, H, T, D] and `key`, `value` of the newest step."""
        query, key = query.to(value.dtype), key.to(value.dtype)
        self._keys.append(key)
        self._values.append(value)
        step, length = len(self._keys) - 1, query.shape[2]
        if not step:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril(-step)
        scores = (query @ self._keys[0].mT).masked_fill(~visible, float("-inf"))
        chain = [(self._shifted(self._keys, step, s) * query).sum(-1, keepdim=True) for s in range(1, step + 1)]
        weights = (torch.cat((scores, *chain), dim=-1).float() * scaling).softmax(-1).to(value.dtype)
        output = weights[..., :length] @ self._values[0]
        for s in range(1, step + 1):
            output = output + weights[..., length + s - 1, None] * self._shifted(self._values, step, s)
        return output

    @staticmethod
    def _shifted(parts: list[Tensor], step: int, of: int) -> Tensor:
        """What step `of` made for index i - step + of, at index i."""
        return later(parts[of], step - of)


def unrolled_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """Attention through the `unrolled` the head was called with; returns [B, T, H, D]."""
    assert attention_mask is None, f"{UNROLLED} takes whole rows, without padding"
    output = kwargs["unrolled"].attend(query, key, value, kwargs["scaling"])
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(UNROLLED, unrolled_attention)


def later(states: Tensor, steps: int) -> Tensor:
    """`states` [..., T, X] moved `steps` places towards the end; zeros come in."""
    return F.pad(states, (0, 0, steps, 0))[..., : states.shape[-2], :]


def new_head(kind: str, target: LlamaForCausalLM, settings: Settings, target_ids: Tensor) -> Head:
    """Random weights for `target`; the embedding (EAGLE-1: the LM head, too) is the target's own, frozen."""
    torch.manual_seed(settings.seed)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(
        **{name: getattr(target.config, name) for name in (*sizes, "rms_norm_eps")},
        num_hidden_layers=1,
        max_position_embeddings=settings.draft_context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    config._attn_implementation = UNROLLED
    embedding = target.get_input_embeddings()
    if kind == "eagle1":
        head = Eagle1Head(config, embedding, target.get_output_embeddings(), bias=False)
    else:
        layers = [int(layer) for layer in settings.eagle_layers.split(",")]
        head = Eagle3Head(config, embedding, layers, target_ids)
    for weight in head.parameters():
        if weight.requires_grad and weight.ndim == 2:
            nn.init.normal_(weight, std=INITIAL_STD)
    if kind == "eagle3":  # the target's own readout of its last state is a better start than none
        head.lm_head.weight.data.copy_(target.get_output_embeddings().weight[target_ids.to(target.device)])
        head.norm.weight.data.copy_(target.model.norm.weight)
    return head.to(target.device)


def frequent_tokens(texts: list[np.ndarray], count: int, vocab_size: int) -> Tensor:
    """The `count` tokens that occur most in `texts`, each text weighing the same; ascending ids [count], int64."""
    shares = sum(np.bincount(text.ravel(), minlength=vocab_size) / max(1, text.size) for text in texts)
    return torch.from_numpy(np.sort(np.argsort(-shares, kind="stable")[:count]))


def head_objective(head: Head, target: LlamaForCausalLM, settings: Settings) -> Callable[[Tensor], Tensor]:
    """Loss of whole rows `tokens` [B, T].

    The divergence of the head's distribution from the target's, over the tokens the head knows; EAGLE-3's summed over
    the steps of its training-time test, EAGLE-1's with the distance of its output from the target's next feature.
    """
    is_eagle1 = isinstance(head, Eagle1Head)
    steps = 1 if is_eagle1 else settings.eagle_steps

    def loss(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            features, final = target_features(head, target, tokens)
            logits = target.lm_head(final[:, 1:]).float()
            wanted = F.log_softmax(logits / settings.teacher_temperature, dim=-1)
            wanted = wanted if head.target_ids is None else wanted[..., head.target_ids]
            if is_eagle1:
                scale = features.float().square().mean().sqrt()
                features = features + FEATURE_NOISE * scale * torch.randn_like(features)
        total = torch.zeros((), device=tokens.device)
        for step, hidden in enumerate(unroll(head, tokens, features, steps)):
            drafted = F.log_softmax(head.logits(hidden[:, step:]).float(), dim=-1)
            expected = wanted[:, step:]
            divergence = (expected.exp() * (expected - drafted)).sum(-1).mean()
            total = total + STEP_WEIGHT**step * divergence
            if is_eagle1:
                total = total + F.smooth_l1_loss(hidden.float(), final[:, 1:].float())
        return total

    return loss


def unroll(head: Head, tokens: Tensor, features: Tensor, steps: int) -> list[Tensor]:
    """The block's output [B, T - 1, H] of every step; from step k on, what stands before index k has no meaning.

    Args:
        tokens: [B, T]; features: [B, T, F] of the target.
    """
    states = head.states(features[:, :-1])
    positions = torch.arange(states.shape[1], device=tokens.device)[None]
    rotation = head.rotary_emb(states, positions)
    unrolled, outputs = Unrolled(), []
    for _ in range(steps):
        outputs.append(head(tokens[:, 1:], states, rotation, unrolled=unrolled))
        states = later(outputs[-1], 1)
    return outputs


def target_features(head: Head, target: LlamaForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What `head` reads of the target, [B, T, F], and the target's final hidden states [B, T, H]."""
    model = target.model
    hidden = model.embed_tokens(tokens)
    rotation = model.rotary_emb(hidden, torch.arange(tokens.shape[1], device=tokens.device)[None])
    entering = [hidden]
    for layer in model.layers:
        entering.append(layer(entering[-1], position_embeddings=rotation))
    final = model.norm(entering[-1])
    if head.entering is None:
        return final, final
    return torch.cat([entering[layer] for layer in head.entering], dim=-1), final


def head_agreement(head: Head, target: LlamaForCausalLM, rows: Tensor, steps: int) -> dict[str, float]:
    """Share of `rows` [n, T] on which the head's choice is the target's: step k + 1 from k of its own states."""
    equal: list[list[Tensor]] = [[] for _ in range(steps)]
    for part in rows.split(8):
        features, final = target_features(head, target, part)
        wanted = target.lm_head(final[:, 1:]).argmax(-1)
        for step, hidden in enumerate(unroll(head, part, features, steps)):
            chosen = head.logits(hidden).argmax(-1)
            chosen = chosen if head.target_ids is None else head.target_ids[chosen]
            equal[step].append((chosen == wanted)[:, step:].float().mean())
    return {f"same_argmax_{step + 1}": torch.stack(shares).mean().item() for step, shares in enumerate(equal)}
