"""Text the target writes itself: what a draft meets in use (on-policy rows), and the test for loops."""

import time

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM

from training.trainer import log

TEMPERATURE = 0.8


@torch.no_grad()
def continue_prompts(model: LlamaForCausalLM, prompts: Tensor, new_tokens: int, temperature: float) -> Tensor:
    """Exactly `new_tokens` after each of `prompts` [B, N], by transformers' own `generate`; [B, N + new_tokens].

    `model` must attend through "sdpa". The end-of-text token does not end a row: another document follows.
    """
    model.generation_config = GenerationConfig()  # its eos would stop rows early
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=None,
        eos_token_id=None,
        pad_token_id=0,
        cache_implementation="static",
        disable_compile=True,
        **({"do_sample": False} | sampling),
    )
    output = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    assert output.shape[1] == prompts.shape[1] + new_tokens, "generate stopped early"
    return output


def write_rows(
    model: LlamaForCausalLM, stream: np.ndarray, *, rows: int, prompt: int, length: int, seconds: float, seed: int
) -> np.ndarray:
    """Rows [n, length] uint16: `prompt` tokens of the stream and what the target makes of them, for about `seconds`.

    A third of the rows is greedy, the others are sampled; every round makes `rows` of them.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    made: list[np.ndarray] = []
    began = time.monotonic()
    while not made or time.monotonic() - began < seconds:
        starts = rng.integers(0, len(stream) - prompt + 1, size=rows)
        prompts = np.stack([stream[start : start + prompt] for start in starts]).astype(np.int64)
        greedy = rows // 3
        for part, temperature in ((prompts[:greedy], 0.0), (prompts[greedy:], TEMPERATURE)):
            if len(part):
                on_device = torch.from_numpy(part).to(model.device)
                written = continue_prompts(model, on_device, length - prompt, temperature)
                made.append(written.cpu().numpy().astype(np.uint16))
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
