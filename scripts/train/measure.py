"""What the pair can do, on held-out text: loss and its gain from context, agreement, copying, facts, loops.

Each measurement is a function from models and windows to a small dictionary that goes into the record as it is. Loss
and agreement run the rounded weights under bfloat16 autocast, whole rows, no cache.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from scripts.train.facts import Fact
from scripts.train.generation import TEMPERATURE, continue_prompts
from scripts.train.models import last_hidden
from scripts.train.trainer import autocast
from specextend.evaluation.answers import ends_in_loop, repeated_share

SLICE = 2048  # positions whose logits exist at once
TAIL = 256  # positions scored before a length
DRAFT_WINDOW = 900  # tokens the windowed draft sees
SPAN, SPAN_AT, SPAN_SCORED = 64, 200, 55


def loss_by_position(target: LlamaForCausalLM, windows: Tensor) -> dict[str, float]:
    """Mean loss between 0, 512, 1,024, ... over `windows` [n, T + 1]."""
    length = windows.shape[1] - 1
    losses = torch.stack([_losses(target, window) for window in windows]).mean(0)
    edges = [0, *_powers(512, length)]
    return {f"{low}-{high}": losses[low:high].mean().item() for low, high in zip(edges, edges[1:], strict=False)}


def loss_by_context(target: LlamaForCausalLM, windows: Tensor) -> dict[str, float]:
    """Loss on the same last tokens of each of `windows` [n, T + 1], given only the last 512, 1,024, ... tokens."""
    gains = {}
    for context in _powers(512, windows.shape[1] - 1):
        tail = min(TAIL, context // 2)
        losses = [_losses(target, window[-context - 1 :])[-tail:].mean() for window in windows]
        gains[str(context)] = torch.stack(losses).mean().item()
    return gains


def agreement_by_position(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, windows: Tensor, draft_context: int
) -> dict[str, dict]:
    """Do draft and target agree on natural text: within the draft's range, far beyond it, and in a sliding window?"""
    whole, sliding = {}, {}
    length = windows.shape[1] - 1
    for window in windows[:, :length]:
        wanted, drafted = _hidden(target, window), _hidden(draft, window)
        ranges = {f"0-{draft_context}": slice(0, draft_context)}
        ends = _powers(2 * draft_context, length)
        ranges |= {str(end): slice(end - min(TAIL, draft_context), end) for end in ends}
        for name, positions in ranges.items():
            whole.setdefault(name, []).append(_agreement(target, draft, wanted[positions], drafted[positions]))
        seen = min(DRAFT_WINDOW, draft_context)
        for end in ends:
            last = slice(end - seen // 14, end)  # 64 of 900: all see nearly the whole draft window
            recent = _hidden(draft, window[end - seen : end])[-(seen // 14) :]
            sliding.setdefault(str(end), []).append(_agreement(target, draft, wanted[last], recent))
    return {
        "full_cache": {name: _mean(parts) for name, parts in whole.items()},
        f"last_{min(DRAFT_WINDOW, draft_context)}_tokens": {name: _mean(parts) for name, parts in sliding.items()},
    }


def agreement_on_own_text(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, writer: LlamaForCausalLM, prompts: Tensor, draft_context: int
) -> dict[str, dict]:
    """The same on what the target writes after `prompts` [n, P], within the draft's range."""
    prompt, figures = prompts.shape[1], {}
    for name, temperature in (("greedy", 0.0), (f"temperature_{TEMPERATURE}", TEMPERATURE)):
        torch.manual_seed(0)
        written = continue_prompts(writer, prompts, draft_context - prompt, temperature)
        parts = []
        for row in written:
            wanted, drafted = _hidden(target, row), _hidden(draft, row)
            parts.append(_agreement(target, draft, wanted[prompt - 1 : -1], drafted[prompt - 1 : -1]))
        figures[name] = _mean(parts)
    return figures


def copying(models: dict[str, LlamaForCausalLM], windows: Tensor, lengths: Sequence[int]) -> dict[str, dict]:
    """Share of the last 55 tokens right when the last 64 repeat those at position 200 (scaled in short contexts)."""

    def planted(length: int) -> Iterator[tuple[Tensor, slice]]:
        span, at, scored = (min(n, length // shrink) for n, shrink in ((SPAN, 4), (SPAN_AT, 8), (SPAN_SCORED, 5)))
        for window in windows:
            row = window[:length].clone()
            row[-span:] = row[at : at + span].clone()
            yield row, slice(length - scored, length)

    return _share_right(models, planted, lengths)


def recalling(
    models: dict[str, LlamaForCausalLM], windows: Tensor, lengths: Sequence[int], facts: Sequence[Fact]
) -> dict[str, dict]:
    """Share of a fact's answer tokens right: stated at position 200 (scaled in short contexts), recalled at the end."""

    def planted(length: int) -> Iterator[tuple[Tensor, slice]]:
        for window, fact in zip(windows, facts, strict=False):
            at, begin = min(SPAN_AT, length // 8), length - len(fact.recall)
            row = window[:length].clone()
            row[at : at + len(fact.statement)] = torch.from_numpy(fact.statement)
            row[begin:] = torch.from_numpy(fact.recall)
            yield row, slice(begin + fact.answer.start, begin + fact.answer.stop)

    return _share_right(models, planted, lengths)


def looping(writer: LlamaForCausalLM, prompts: Tensor, new_tokens: int) -> dict[str, float]:
    """How much the target's greedy text repeats itself after `prompts` [n, P]."""
    rows = continue_prompts(writer, prompts, new_tokens, 0.0)[:, prompts.shape[1] :].cpu().numpy()
    return {
        "prompts": len(rows),
        "prompt_tokens": prompts.shape[1],
        "new_tokens": new_tokens,
        "repeated_4grams": float(np.mean([repeated_share(row) for row in rows])),
        "ends_in_loop": float(np.mean([ends_in_loop(row) for row in rows])),
    }


def _share_right(
    models: dict[str, LlamaForCausalLM],
    planted: Callable[[int], Iterator[tuple[Tensor, slice]]],
    lengths: Sequence[int],
) -> dict[str, dict]:
    shares: dict[str, dict] = {name: {} for name in models}
    for length in lengths:
        for name, model in models.items():
            right = total = 0
            for row, scored in planted(length):
                row = row.to(model.device)
                hidden = _hidden(model, row)[scored.start - 1 : scored.stop - 1]
                right += (_logits(model, hidden).argmax(-1) == row[scored]).sum().item()
                total += scored.stop - scored.start
            shares[name][str(length)] = right / total
    return shares


def _agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, wanted: Tensor, drafted: Tensor) -> Tensor:
    """[3] from hidden states [n, .]: equal argmax; overlap of target at 0.8 with draft at 1; with draft at 0.8."""
    sums = torch.zeros(3, device=wanted.device)
    for wanted_part, drafted_part in zip(wanted.split(SLICE), drafted.split(SLICE), strict=True):
        p, q = _logits(target, wanted_part), _logits(draft, drafted_part)
        warm = F.softmax(p / TEMPERATURE, -1)
        sums[0] += (p.argmax(-1) == q.argmax(-1)).sum()
        sums[1] += torch.minimum(warm, F.softmax(q, -1)).sum()
        sums[2] += torch.minimum(warm, F.softmax(q / TEMPERATURE, -1)).sum()
    return sums / len(wanted)


def _mean(parts: list[Tensor]) -> dict[str, float]:
    names = ("same_argmax", "overlap_draft_at_1.0", f"overlap_draft_at_{TEMPERATURE}")
    return dict(zip(names, torch.stack(parts).mean(0).tolist(), strict=True))


def _losses(model: LlamaForCausalLM, window: Tensor) -> Tensor:
    """Loss [T] of each token of `window` [T + 1] after the first."""
    hidden = _hidden(model, window[:-1])
    labels = window[1:].to(model.device)
    parts = zip(hidden.split(SLICE), labels.split(SLICE), strict=True)
    return torch.cat([F.cross_entropy(_logits(model, part), label, reduction="none") for part, label in parts])


@torch.no_grad()
def _hidden(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Final hidden states [T, hidden] of one row `tokens` [T]."""
    with autocast(model.device):
        return last_hidden(model, tokens[None].to(model.device))[0]


@torch.no_grad()
def _logits(model: LlamaForCausalLM, hidden: Tensor) -> Tensor:
    """[n, V] float32."""
    with autocast(model.device):
        return model.lm_head(hidden).float()


def _powers(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first, ... up to last; halves of `last` when even `first` is beyond it."""
    if first > last:
        return [last // 2, last]
    return [first << n for n in range((last // first).bit_length())]
