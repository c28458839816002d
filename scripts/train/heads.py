"""EAGLE heads of the target: what they are trained on, and the training-time test of EAGLE-3 (Li et al., 2025).

A head reads pairs (token i + 1, state of token i). In the training-time test its own outputs become the states of the
next step, as they do from level to level of a draft tree, and the loss is taken at every step; EAGLE-1 is trained in
the same way, as in HASS (Zhang et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from eagle.heads import Eagle1Head, Eagle3Head, Head
from scripts.train.settings import Settings

UNROLLED = "bundled_unrolled"
STEP_WEIGHT = 0.8  # of a step's loss against the step before it
INITIAL_STD = 0.02


class Unrolled:
    """Attention through the steps of a training-time test, one call per step; doubles as the model's attention.

    Step 0 makes all pairs, each seeing those up to its own. Then chains begin at some of them: step k of the chain
    that starts at index j is the pair at j + k. It sees pairs 0 .. j as step 0 made them, and its own chain's since.

    Args:
        starts: [n] indices at which chains begin.
    """

    def __init__(self, starts: Tensor) -> None:
        self._starts = starts
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention over all steps so far, for the newest; [B, H, T, D] at step 0, then [B, H, n, D]."""
        query, key = query.to(value.dtype), key.to(value.dtype)
        self._keys.append(key)
        self._values.append(value)
        (base_keys, *chain_keys), (base_values, *chain_values) = self._keys, self._values
        if not chain_keys:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        length = base_keys.shape[2]
        unseen = torch.arange(length, device=query.device) > self._starts[:, None]
        scores = (query @ base_keys.mT).masked_fill(unseen, float("-inf"))
        own = [(query * key).sum(-1, keepdim=True) for key in chain_keys]
        weights = (torch.cat((scores, *own), dim=-1).float() * scaling).softmax(-1).to(value.dtype)
        output = weights[..., :length] @ base_values
        for step, value in enumerate(chain_values):
            output = output + weights[..., length + step, None] * value
        return output


def unrolled_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """Attention through the `unrolled` the head was called with; returns [B, T, H, D]."""
    assert attention_mask is None, f"{UNROLLED} takes whole rows, without padding"
    output = kwargs["unrolled"].attend(query, key, value, kwargs["scaling"])
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(UNROLLED, unrolled_attention)


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
    """Loss of whole rows `tokens` [B, T], summed over the steps of a training-time test.

    The divergence of the head's distribution from the target's, over the tokens the head knows; EAGLE-1's with the
    distance of its output from the target's next feature.
    """
    is_eagle1, steps = isinstance(head, Eagle1Head), settings.eagle_steps

    def loss(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            features, final = target_features(head, target, tokens)
            nexts = final[:, 1:]
            wanted = F.log_softmax(target.lm_head(nexts).float() / settings.teacher_temperature, dim=-1)
            wanted = wanted if head.target_ids is None else wanted[..., head.target_ids]
        starts = chain_starts(tokens, steps, settings.eagle_stride)
        total = torch.zeros((), device=tokens.device)
        for step, hidden in enumerate(unroll(head, tokens, features, starts, steps)):
            drafted = F.log_softmax(head.logits(hidden).float(), dim=-1)
            expected = at_step(step, starts, wanted)
            distance = (expected.exp() * (expected - drafted)).sum(-1).mean()
            if is_eagle1:
                distance = distance + F.smooth_l1_loss(hidden.float(), at_step(step, starts, nexts).float())
            total = total + STEP_WEIGHT**step * distance
        return total

    return loss


def chain_starts(tokens: Tensor, steps: int, stride: int) -> Tensor:
    """Every `stride`-th index from a random one on, [n], such that `steps` steps stay within `tokens` [B, T].

    Neighbouring chains teach much the same, and step 0 has taught all pairs. The offset never changes n: one shape.
    """
    count = (tokens.shape[1] - steps) // stride
    offset = torch.randint(stride, (1,), device=tokens.device)
    return torch.arange(count, device=tokens.device) * stride + offset


def at_step(step: int, starts: Tensor, sequence: Tensor) -> Tensor:
    """Of `sequence` [B, T - 1, ...], what belongs to the pairs of `step`: all at step 0, then [B, n, ...]."""
    return sequence.index_select(1, starts + step) if step else sequence


def unroll(head: Head, tokens: Tensor, features: Tensor, starts: Tensor, steps: int) -> list[Tensor]:
    """The block's output of every step: [B, T - 1, H] of all pairs, then [B, n, H] of the chains from `starts` [n].

    Args:
        tokens: [B, T]; features: [B, T, F] of the target.
    """
    states = head.states(features[:, :-1])
    rotation = head.rotary_emb(states, torch.arange(states.shape[1], device=tokens.device)[None])
    unrolled, outputs = Unrolled(starts), []
    for step in range(steps):
        newest, cos, sin = (at_step(step, starts, sequence) for sequence in (tokens[:, 1:], *rotation))
        outputs.append(head(newest, states, (cos, sin), unrolled=unrolled))
        states = outputs[-1] if step else outputs[-1].index_select(1, starts)
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
    starts = chain_starts(rows, steps, stride=1)
    equal: list[list[Tensor]] = [[] for _ in range(steps)]
    for part in rows.split(8):
        features, final = target_features(head, target, part)
        wanted = target.lm_head(final[:, 1:]).argmax(-1)
        for step, hidden in enumerate(unroll(head, part, features, starts, steps)):
            chosen = head.logits(hidden).argmax(-1)
            chosen = chosen if head.target_ids is None else head.target_ids[chosen]
            equal[step].append((chosen == at_step(step, starts, wanted)).float().mean())
    return {f"same_argmax_{step + 1}": torch.stack(shares).mean().item() for step, shares in enumerate(equal)}
