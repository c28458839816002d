"""Random histories of prompts, and what must be true of an engine after each: it answers as a fresh one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from conftest import backend_of
from hypothesis import strategies as st
from torch import Tensor

from specextend.config import SamplingConfig
from specextend.engine import SpecExtend
from specextend.modeling.target import Target


class Step(NamedTuple):
    """A prompt: so much of an earlier context, answer included, and new tokens behind it."""

    base: int
    cut: float
    tail: list[int]
    turn: int


STEPS = st.lists(
    st.builds(
        Step,
        base=st.integers(0, 5),
        cut=st.sampled_from([1.0, 1.0, 1.0, 0.8, 0.5, 0.0]),
        tail=st.lists(st.integers(0, 96), max_size=6),
        turn=st.integers(0, 1),
    ),
    min_size=2,
    max_size=5,
)


def assert_fresh_after(
    steps: Sequence[Step],
    document: Tensor,
    engines: Sequence[SpecExtend],
    fresh: Callable[[SpecExtend], SpecExtend],
    new_tokens: int,
    *,
    sampling: SamplingConfig,
    slack: int = 0,
) -> None:
    """Tokens, and drafts kept per round, are a fresh engine's after any of `steps`, and no token is read twice.

    Args:
        engines: take turns; they share the target's cache.
        slack: tokens in front of the newest that the target may have to read again.
    """
    contexts, newest = [document], document[:0]
    for step in steps:
        base = contexts[step.base % len(contexts)]
        kept = base[: round(step.cut * len(base))]
        prompt = torch.cat((kept, torch.tensor(step.tail, dtype=torch.long)))
        prompt = prompt if len(prompt) else document[:1]
        engine = engines[step.turn % len(engines)]
        read = tokens_read(engine)
        found = engine.generate(prompt, new_tokens, sampling=sampling)
        wanted = fresh(engine).generate(prompt, new_tokens, sampling=sampling)
        assert found.token_ids == wanted.token_ids
        assert [(one.drafted, one.accepted) for one in found.rounds] == [
            (one.drafted, one.accepted) for one in wanted.rounds
        ]
        assert sum(read) == len(prompt) - found.cached_tokens and not wanted.cached_tokens
        if len(engines) == 1:
            assert found.cached_tokens >= common(newest[:-1], prompt[:-1]) - slack
        newest = torch.cat((prompt, torch.tensor(found.token_ids)))
        contexts.append(newest)


def tokens_read(engine: SpecExtend) -> list[int]:
    """Grows by the length of every block that the target's prefill reads from now on."""
    backend, lengths = backend_of(engine), []
    target = getattr(backend, "_host_target", None) or backend._target

    def counted(read: Callable[[Target, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def read_counted(block: Tensor) -> Tensor:
            lengths.append(len(block))
            return read(target, block)

        return read_counted

    target._read, target._read_short = counted(type(target)._read), counted(type(target)._read_short)
    return lengths


def common(left: Tensor, right: Tensor) -> int:
    """Tokens that both begin with."""
    pairs = zip(left.tolist(), right.tolist(), strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right)))
