"""What the decode loop asks of whoever computes its steps, and what all of those do alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from specextend.config import RoundSlots
from specextend.decoding.clock import StageClock
from specextend.decoding.output import Output
from specextend.decoding.prefixes import Known, NoReuse
from specextend.drafting.drafter import Drafter
from specextend.errors import CapacityError
from specextend.modeling.blocks import OnBlock
from specextend.modeling.target import Target
from specextend.trees.tree import DraftTree

ReadsTokens = Callable[[Sequence[int]], None]
RESERVED = 4096  # new tokens that the caches have room for at first; they grow when more are written


class Backend(Protocol):
    """The steps of a round, in the order of `loop.decode`; everything of a prompt is forgotten with the next.

    Attributes:
        name: "eager" (plain PyTorch, the definition) or "graphs" (captured CUDA graphs over Triton kernels).
    """

    name: str
    device: torch.device

    def prefill(self, output: Output) -> Tensor:
        """Read the prompt of `output` with target and draft; the target's first token []."""

    def plan(self) -> None:
        """Decide how large a tree this round drafts, or that it does not speculate."""

    def refresh_is_due(self) -> bool:
        """Whether the draft's working cache is chosen anew before this round."""

    def refresh(self) -> None:
        """Choose the draft's working cache ("Cross-model Retrieval")."""

    def draft(self) -> None:
        """Grow a tree below the newest token, and leave of it what is worth verifying."""

    def verify(self) -> None:
        """Let the target choose a token after every node of the tree."""

    def accept(self) -> None:
        """Keep the nodes that are the target's own choice, and its token after the last of them."""

    def read(self) -> tuple[int, list[int]]:
        """Nodes drafted, and the round's tokens, the bonus token last; the one time that the host waits."""


@contextmanager
def unchanged(*values: Tensor) -> Iterator[None]:
    """What is inside leaves `values` as they were, however it ends."""
    saved = [value.clone() for value in values]
    try:
        yield
    finally:
        for value, before in zip(values, saved, strict=True):
            value.copy_(before)


def read_prompt(
    output: Output, target: Target, drafter: Drafter, extra_slots: int, prefixes: NoReuse, also: ReadsTokens
) -> Tensor:
    """Let target and draft read the prompt of `output`, with room for `extra_slots` more; the first token [].

    `also` reads its token ids while a GPU is busy with it. What ends it halfway leaves behind what was read, for the
    next prompt that begins like this one.
    """
    reading, tokens = Reading(output, prefixes.enter(output)), output.prompt.tolist()
    try:
        return _read(output, target, drafter, extra_slots, prefixes, reading, partial(also, tokens))
    except BaseException:
        prefixes.hold_part(output, reading.done)
        raise


def _read(
    output: Output, target: Target, drafter: Drafter, extra_slots: int, prefixes: NoReuse, reading: Reading,
    meanwhile: Callable[[], None],
) -> Tensor:  # fmt: skip
    clock, known = StageClock(target.model.device), reading.done
    try:
        logits = target.prefill(output.prompt, extra_slots, known.target, reading.of("target"))
    except (CapacityError, torch.OutOfMemoryError):
        if not prefixes.make_room() and not known.target:
            raise
        # a cache that keeps nothing is freed before a larger one is made
        known = reading.done = known._replace(target=0)
        logits = target.prefill(output.prompt, extra_slots, on_block=reading.of("target"))
    reading.done = known._replace(target=output.prompt_tokens)
    first = output.choose(logits, DraftTree.root(output.prompt[-1]), 0)[0]
    clock.mark("target")
    drafter.prefill(output.prompt, first, extra_slots, known.draft, reading.of("draft"))
    meanwhile()
    clock.mark("draft")
    prefixes.hold(output)
    output.cached_tokens, output.prefill_seconds = known.target, clock.stage_seconds()
    return first


class Reading:
    """How far target and draft are in the prompt of `output`.

    Attributes:
        done: entries of their caches that are right.
    """

    def __init__(self, output: Output, known: Known):
        self._output, self.done = output, known
        self._queued: torch.cuda.Event | None = None

    def of(self, part: str) -> OnBlock:
        """What the prefill of `part`, "target" or "draft", tells of each block."""

        def on_block(entries: int) -> None:
            self.done = self.done._replace(**{part: entries})
            if self._output.on_block is not None:
                self._wait()
                self._output.on_block(part, entries)

        return on_block

    def _wait(self) -> None:
        """Keep a GPU's queue at one block: otherwise the host would have asked for all of them at once."""
        if self._output.prompt.is_cuda:
            if self._queued is not None:
                self._queued.synchronize()
            self._queued = torch.cuda.Event()
            self._queued.record()


class Reservation:
    """How much context the caches have room for, in steps: a long answer that is not written takes no memory.

    Attributes:
        tokens: prompt and new tokens with a place.
    """

    def __init__(self, output: Output, slots: RoundSlots):
        self._prompt, self._slots = output.prompt_tokens, slots
        self._most = self._prompt + output.max_new_tokens
        self.tokens = min(self._most, self._prompt + RESERVED)

    @property
    def extra_slots(self) -> int:
        """Cache slots beyond the prompt, a round's included."""
        return self.tokens - self._prompt + self._slots.verify

    def is_short(self, context: int) -> bool:
        """Whether a round behind `context` tokens may write more than there is room for."""
        return self.tokens < self._most and context + self._slots.path > self.tokens

    def grow(self, context: int) -> None:
        """Half as much again, or what is still allowed."""
        self.tokens = min(self._most, max(context + self._slots.path, self.tokens * 3 // 2))
