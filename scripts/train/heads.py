"""EAGLE heads of the target: what they are trained on, and the training-time test of EAGLE-3 (Li et al., 2025).

A head reads pairs (token i + 1, state of token i). In the training-time test its own outputs become the states of the
next step, as they do from level to level of a draft tree, and the loss is taken at every step; EAGLE-1 is trained in
the same way, as in HASS (Zhang et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from eagle.heads import Eagle1Head, Eagle3Head, Head
from scripts.train.divergence import chunk_divergence, divergence
from scripts.train.settings import Settings, TrainingError

UNROLLED = "bundled_unrolled"
STEP_WEIGHT = 0.8  # of a step's loss against the step before it
INITIAL_STD = 0.02
COVERED = 0.95  # of the target's answers by EAGLE-3's draft vocabulary, where its size is not given


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
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    output = kwargs["unrolled"].attend(query, key, value, kwargs["scaling"])
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(UNROLLED, unrolled_attention)


def new_head(kind: str, target: LlamaForCausalLM, settings: Settings, target_ids: Tensor) -> Head:
    """Random weights for `target`; the embedding (EAGLE-1: the LM head, too) is the target's own, frozen."""
    torch.manual_seed(settings.seed)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(
        **{name: getattr(target.config, name) for name in (*sizes, "rms_norm_eps")},
        head_dim=getattr(target.config, "head_dim", None),
        num_hidden_layers=1,
        max_position_embeddings=settings.draft_context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    config._attn_implementation = UNROLLED
    embedding, readout = target.get_input_embeddings(), target.get_output_embeddings()
    if kind == "eagle1":
        head = Eagle1Head(config, embedding, readout, bias=False)
    else:
        head = Eagle3Head(config, embedding, feature_layers(target, settings), target_ids)
    for weight in head.parameters():
        if weight.requires_grad and weight.ndim == 2:
            nn.init.normal_(weight, std=INITIAL_STD)
    if kind == "eagle3":  # the target's own readout of its last state is a better start than none
        head.lm_head.weight.data.copy_(readout.weight[target_ids.to(target.device)])
        head.norm.weight.data.copy_(target.model.norm.weight)
    return head.to(target.device)


def feature_layers(target: LlamaForCausalLM, settings: Settings) -> list[int]:
    """The layers whose inputs EAGLE-3 reads: those asked for, else the published choice."""
    layers = target.config.num_hidden_layers
    if not settings.eagle_layers:  # of few layers the last state is the third
        return [2, layers // 2, layers - 3] if layers > 8 else [layers // 3, 2 * layers // 3, layers]
    asked = [int(layer) for layer in settings.eagle_layers.split(",")]
    if not all(0 <= layer <= layers for layer in asked):
        raise TrainingError(f"--eagle_layers {settings.eagle_layers}: the target has {layers} layers")
    return asked


def draft_vocabulary(text: np.ndarray, asked: int, vocab_size: int) -> tuple[Tensor, float]:
    """EAGLE-3's draft vocabulary, ascending target ids, and which share of `text` [N] it covers.

    Args:
        asked: its size; 0 takes as many thousand tokens as cover `COVERED` of the text.
    """
    counts = np.bincount(text, minlength=vocab_size)
    order = np.argsort(-counts, kind="stable")
    covered = counts[order].cumsum() / max(1, len(text))
    needed = int(np.searchsorted(covered, COVERED)) + 1
    size = min(vocab_size, asked or 1024 * -(-needed // 1024))
    return torch.from_numpy(np.sort(order[:size])), float(covered[size - 1])


def head_objective(
    heads: Mapping[str, Head], target: LlamaForCausalLM, settings: Settings, pairs: int,
    compiled: Callable[[Callable], Callable] = lambda function: function,
) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    """Loss of rows `tokens` [B, T] on `pairs` pairs from `first` [] on, summed over heads and steps.

    One pass of the target serves all heads. Each minimises the divergence of its distribution from the target's, over
    the tokens it knows; EAGLE-1 the distance of its output from the target's next feature, too.
    """
    steps, readout = settings.eagle_steps, target.get_output_embeddings().weight
    one_chunk = compiled(chunk_divergence)
    unrolls = {kind: compiled(_unroller(head, steps)) for kind, head in heads.items()}

    def loss(tokens: Tensor, first: Tensor) -> Tensor:
        final, features = target_features(heads, target, tokens)
        at = first + torch.arange(pairs, device=tokens.device)
        starts = first + chain_starts(pairs, steps, settings.eagle_stride, tokens.device)
        indices = torch.cat([at, *(starts + step for step in range(1, steps))])
        nexts = final[:, 1:].index_select(1, indices).flatten(0, 1)
        weights = torch.cat(
            [torch.full_like(one, STEP_WEIGHT**step / (len(one) * len(tokens)), dtype=torch.float32)
             for step, one in enumerate((at, *[starts] * (steps - 1)))]
        ).repeat(len(tokens))  # fmt: skip
        total = torch.zeros((), device=tokens.device)
        for kind, head in heads.items():
            all_pairs, *chains = unrolls[kind](tokens, features[kind], starts)
            hidden = torch.cat([all_pairs.index_select(1, at), *chains], dim=1).flatten(0, 1)
            normed = head.norm(hidden) if isinstance(head, Eagle3Head) else hidden
            total = total + divergence(
                normed, head.lm_head.weight, nexts, readout, head.target_ids, weights, settings.teacher_temperature,
                one_chunk,
            )  # fmt: skip
            if isinstance(head, Eagle1Head):
                distance = F.smooth_l1_loss(hidden.float(), nexts.float(), reduction="none").mean(-1)
                total = total + (weights * distance).sum()
        return total

    return loss


def _unroller(head: Head, steps: int) -> Callable[..., list[Tensor]]:
    def unrolled(tokens: Tensor, features: Tensor, starts: Tensor) -> list[Tensor]:
        return unroll(head, tokens, features, starts, steps)

    return unrolled


def chain_starts(pairs: int, steps: int, stride: int, device: torch.device | str = "cpu") -> Tensor:
    """Every `stride`-th index from a random one on, [n], such that `steps` steps stay within `pairs` pairs.

    Neighbouring chains teach much the same, and step 0 has taught all pairs. The offset never changes n: one shape.
    """
    count = (pairs + 1 - steps) // stride
    offset = torch.randint(stride, (1,), device=device)
    return torch.arange(count, device=device) * stride + offset


def at_step(step: int, starts: Tensor, sequence: Tensor) -> Tensor:
    """Of `sequence` [B, T - 1, ...], what belongs to the pairs of `step`: all at step 0, then [B, n, ...]."""
    return sequence.index_select(1, starts + step) if step else sequence


def unroll(head: Head, tokens: Tensor, features: Tensor, starts: Tensor, steps: int) -> list[Tensor]:
    """The block's output of every step: [B, T - 1, H] of all pairs, then [B, n, H] of the chains from `starts` [n].

    Args:
        tokens: [B, T]; features: [B, T, F] of the target.
    """
    states = head.states(features[:, :-1])
    positions = torch.arange(states.shape[1], device=tokens.device)[None]
    rotation = head.rotary_emb(torch.empty(0, device=tokens.device), positions)  # in float32
    unrolled, outputs = Unrolled(starts), []
    for step in range(steps):
        newest, cos, sin = (at_step(step, starts, sequence) for sequence in (tokens[:, 1:], *rotation))
        outputs.append(head(newest, states, (cos, sin), unrolled=unrolled))
        states = outputs[-1] if step else outputs[-1].index_select(1, starts)
    return outputs


@torch.no_grad()
def target_features(
    heads: Mapping[str, Head], target: LlamaForCausalLM, tokens: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The target's final hidden states [B, T, H], and what each head reads of it, [B, T, F]; in the target's dtype."""
    model = target.model
    wanted = {layer for head in heads.values() for layer in head.entering or ()}
    with torch.autocast(tokens.device.type, enabled=False):
        hidden = model.embed_tokens(tokens)
        rotation = model.rotary_emb(hidden, torch.arange(tokens.shape[1], device=tokens.device)[None])
        entering = {}
        for index, layer in enumerate(model.layers):
            if index in wanted:
                entering[index] = hidden
            hidden = layer(hidden, position_embeddings=rotation)
        entering[len(model.layers)] = hidden
        final = model.norm(hidden)
    return final, {
        kind: final if head.entering is None else torch.cat([entering[layer] for layer in head.entering], dim=-1)
        for kind, head in heads.items()
    }


def head_agreement(
    heads: Mapping[str, Head], target: LlamaForCausalLM, rows: Tensor, first: int, pairs: int, steps: int
) -> dict[str, dict[str, float]]:
    """For each head, on `pairs` pairs of `rows` [n, T] from `first` on: how often its choice is the target's.

    Step k + 1 is from k of its own states.
    """
    at = first + torch.arange(pairs, device=rows.device)
    starts = first + chain_starts(pairs, steps, 1, rows.device)
    equal = {kind: [[] for _ in range(steps)] for kind in heads}
    for part in rows.split(8):
        final, features = target_features(heads, target, part)
        with torch.no_grad(), torch.autocast(part.device.type, enabled=False):
            wanted = target.get_output_embeddings()(final[:, 1:]).argmax(-1)
        for kind, head in heads.items():
            for step, hidden in enumerate(unroll(head, part, features[kind], starts, steps)):
                hidden = hidden if step else hidden.index_select(1, at)
                chosen = head.logits(hidden.to(head.lm_head.weight.dtype)).argmax(-1)
                chosen = chosen if head.target_ids is None else head.target_ids[chosen]
                same = chosen == wanted.index_select(1, starts + step if step else at)
                equal[kind][step].append(same.float().mean())
    return {
        kind: {f"same_argmax_{step + 1}": torch.stack(shares).mean().item() for step, shares in enumerate(by_step)}
        for kind, by_step in equal.items()
    }
