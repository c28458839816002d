"""Text the target writes itself: what a draft meets in use (on-policy rows)."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from scripts.train.settings import token_dtype
from scripts.train.trainer import log
from specextend.models.checkpoints import available_bytes

TEMPERATURE = 0.8


class BatchCache:
    """Keys and values of rows of one length, so that no mask is needed; doubles as the model's attention.

    Args:
        rows, capacity: how many rows of how many tokens it can hold.
    """

    def __init__(self, model: LlamaForCausalLM, rows: int, capacity: int) -> None:
        shape = (2, rows, model.config.num_key_value_heads, capacity, head_dim_of(model))
        layers = range(model.config.num_hidden_layers)
        self._buffers = [torch.empty(shape, dtype=model.dtype, device=model.device) for _ in layers]
        self.length = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention [B, H, T, D] of the newest T tokens, causal, over all so far."""
        end = self.length + key.shape[2]
        stored = self._buffers[layer]
        stored[0, :, :, self.length : end] = key
        stored[1, :, :, self.length : end] = value
        keys, values = stored[:, :, :, :end]
        if query.shape[2] > 1:
            grouped = query.shape[1] != keys.shape[1]
            return F.scaled_dot_product_attention(
                query, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped
            )
        # of one token, the query heads that share a KV head become rows: keys and values are read once
        rows = query.reshape(len(query), keys.shape[1], -1, query.shape[3])
        return F.scaled_dot_product_attention(rows, keys, values, scale=scaling).reshape(query.shape)


@torch.inference_mode()
def continue_prompts(model: LlamaForCausalLM, prompts: Tensor, new_tokens: int, temperature: float | Tensor) -> Tensor:
    """Exactly `new_tokens` after each of `prompts` [B, N]; [B, N + new_tokens].

    `model` must attend through `CACHED`. The end-of-text token does not end a row: another document follows.
    A `temperature` [B] is one per row; 0 is greedy.
    """
    cache = BatchCache(model, len(prompts), prompts.shape[1] + new_tokens)
    temperature = torch.as_tensor(temperature, device=prompts.device).expand(len(prompts))
    written, newest = [prompts], prompts
    for _ in range(new_tokens):
        positions = torch.arange(cache.length, cache.length + newest.shape[1], device=prompts.device)[None]
        logits = model(newest, position_ids=positions, use_cache=False, logits_to_keep=1, cache=cache).logits[:, -1]
        cache.length += newest.shape[1]
        newest = next_tokens(logits, temperature)
        written.append(newest)
    return torch.cat(written, dim=1)


def next_tokens(logits: Tensor, temperature: Tensor) -> Tensor:
    """Tokens [B, 1] of `logits` [B, V]: the likeliest where `temperature` [B] is 0, else sampled."""
    is_greedy = (temperature == 0)[:, None]
    divisor = temperature[:, None].masked_fill(is_greedy, 1.0)  # what a greedy row samples is not used
    sampled = torch.multinomial((logits.float() / divisor).softmax(-1), 1)
    return torch.where(is_greedy, logits.argmax(-1, keepdim=True), sampled)


@dataclass(frozen=True)
class Written:
    """What the target wrote: rows [n, context], of which the first `prompts` [n] tokens were given to it.

    Its answer follows, `answers` [n] tokens with the one that ends it; what stands behind is other rows' text.
    """

    rows: np.ndarray
    prompts: np.ndarray
    answers: np.ndarray
    greedy: np.ndarray

    def save(self, path: Path) -> None:
        np.savez(path, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    @classmethod
    def load(cls, path: Path) -> "Written":
        with np.load(path) as arrays:
            return cls(**arrays)


def write_rows(
    model: LlamaForCausalLM, prompts: Callable[[int, int], np.ndarray], *, lengths: Sequence[int], rows: int,
    context: int, answer: int, stops: Collection[int], seconds: float, seed: int,
) -> Written:  # fmt: skip
    """Let the target answer prompts for about `seconds`, a third of each batch greedily, the others sampled.

    Args:
        prompts: count, length -> ids [count, length].
        lengths: of the prompts, batch by batch, over and over.
        rows: at a time, fewer where memory asks for it.
        answer: tokens at most.
        stops: ids that end an answer; without any, the row is one text to its end.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    rows = min(rows, rows_in_memory(model, max(lengths) + answer))
    temperature = torch.full((rows,), TEMPERATURE)
    temperature[: max(1, rows // 3)] = 0.0
    made: list[Written] = []
    began = time.monotonic()
    for length in itertools.cycle(lengths):
        if made and time.monotonic() - began >= seconds:
            break
        given = torch.from_numpy(prompts(rows, length)).to(model.device)
        text = continue_prompts(model, given, answer, temperature).cpu().numpy()
        ends = [np.flatnonzero(np.isin(row[length:], list(stops))) for row in text]
        sizes = np.array([end[0] + 1 if len(end) else answer for end in ends])
        whole = np.stack([_filled(text, i, length + sizes[i], context) for i in range(rows)])
        made.append(Written(whole, np.full(rows, length), sizes, (temperature == 0).numpy()))
        seconds_so_far = time.monotonic() - began
        log(f"wrote {rows} rows behind {length} tokens, {seconds_so_far:.1f}s; {sizes.mean():.0f} tokens an answer")
    order = rng.permutation(rows * len(made))
    dtype = token_dtype(model.config.vocab_size)
    whole, *others = (
        np.concatenate([getattr(batch, field.name) for batch in made])[order] for field in dataclasses.fields(Written)
    )
    return Written(whole.astype(dtype), *others)


def _filled(text: np.ndarray, index: int, end: int, context: int) -> np.ndarray:
    """Row `index` up to `end`, then the rows after it, round and round, until there are `context` tokens."""
    parts, size = [text[index, :end]], end
    while size < context:
        index = (index + 1) % len(text)
        parts.append(text[index])
        size += len(text[index])
    return np.concatenate(parts)[:context]


def rows_in_memory(model: LlamaForCausalLM, length: int, share: float = 0.5) -> int:
    """How many rows of `length` tokens fit into a share of what memory is left, their logits included."""
    config = model.config
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim_of(model) * length
    row = cached * model.dtype.itemsize + 12 * config.vocab_size
    free = available_bytes(model.device)
    return max(1, int(share * free / row)) if free else 64


def head_dim_of(model: LlamaForCausalLM) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
