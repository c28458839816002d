"""Text the target writes itself: what a draft meets in use (on-policy rows), and the test for loops."""

import time

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from scripts.train.trainer import log

TEMPERATURE = 0.8


class BatchCache:
    """Keys and values of rows of one length, so that no mask is needed; doubles as the model's attention.

    Args:
        rows, capacity: how many rows of how many tokens it can hold.
    """

    def __init__(self, model: LlamaForCausalLM, rows: int, capacity: int) -> None:
        config = model.config
        shape = (2, config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_dim)
        self._buffer = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.length = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention [B, H, T, D] of the newest T tokens, causal, over all so far."""
        end = self.length + key.shape[2]
        self._buffer[0, layer, :, :, self.length : end] = key
        self._buffer[1, layer, :, :, self.length : end] = value
        keys, values = self._buffer[0, layer, :, :, :end], self._buffer[1, layer, :, :, :end]
        return F.scaled_dot_product_attention(query, keys, values, is_causal=query.shape[2] > 1, scale=scaling)


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


def write_rows(
    model: LlamaForCausalLM, stream: np.ndarray, *, rows: int, prompt: int, length: int, seconds: float, seed: int
) -> np.ndarray:
    """Rows [n, length] uint16: `prompt` tokens of the stream and what the target makes of them, for about `seconds`.

    A third of the rows is greedy, the others are sampled; every round makes `rows` of them.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    temperature = torch.full((rows,), TEMPERATURE)
    temperature[: rows // 3] = 0.0
    made: list[np.ndarray] = []
    began = time.monotonic()
    while not made or time.monotonic() - began < seconds:
        starts = rng.integers(0, len(stream) - prompt + 1, size=rows)
        prompts = np.stack([stream[start : start + prompt] for start in starts]).astype(np.int64)
        on_device = torch.from_numpy(prompts).to(model.device)
        made.append(continue_prompts(model, on_device, length - prompt, temperature).cpu().numpy().astype(np.uint16))
        log(f"target wrote {sum(map(len, made))} rows of {length} tokens in {time.monotonic() - began:.1f}s")
    written = np.concatenate(made)
    return written[rng.permutation(len(written))]


def repeated_share(tokens: np.ndarray, order: int = 4) -> float:
    """Share of the `order`-grams of `tokens` [N] that occurred in it before."""
    grams = np.lib.stride_tricks.sliding_window_view(tokens, order)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


def ends_in_loop(tokens: np.ndarray, tail: int = 64, max_period: int = 64) -> bool:
    """Do the last `tail` tokens of `tokens` [N] repeat what stands some period <= `max_period` before them?"""
    longest = min(max_period, len(tokens) - tail)
    return any(np.array_equal(tokens[-tail:], tokens[-tail - p : -p]) for p in range(1, longest + 1))
