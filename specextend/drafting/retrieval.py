"""Which part of the context the draft attends to ("Cross-model Retrieval").

A retriever maps the target's attention over the context to positions. It keeps no state: a selection belongs to its
prompt, and nothing survives into the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from specextend.config import RetrievalConfig


class Retriever(Protocol):
    """When to refresh the draft's working cache, and with what.

    Attributes:
        reads_attention: whether the target's attention decides.
        config: first and newest chunks always kept, and how many in all.
    """

    reads_attention: bool
    config: RetrievalConfig

    def is_due(self, rounds: int, length: int) -> bool:
        """Whether to refresh before the next round.

        Args:
            rounds: run since the prefill.
            length: tokens of the context. While all of them fit, the first refresh takes them all.
        """

    def select(self, attention: Callable[[], Tensor], length: int) -> Tensor:
        """Positions [m] of the context to keep, ascending, out of 0..length-1.

        Args:
            attention: gives the target's attention [N] over the committed context, for those who ask.
            length: tokens in the draft's full cache, at most N.
        """


class NoRetrieval:
    """The draft keeps everything: there is nothing to refresh."""

    reads_attention = False
    config = RetrievalConfig()

    def is_due(self, rounds: int, length: int) -> bool:
        return False

    def select(self, attention: Callable[[], Tensor], length: int) -> Tensor:
        return torch.arange(length)


@dataclass(frozen=True)
class _Chunks:
    config: RetrievalConfig
    reads_attention = False

    def is_due(self, rounds: int, length: int) -> bool:
        overflows = length > self.config.top_k * self.config.chunk_size
        return rounds == 0 or (overflows and rounds % self.config.every_n_steps == 0)

    def select(self, attention: Callable[[], Tensor], length: int) -> Tensor:
        row = attention() if self.reads_attention else None
        device = None if row is None else row.device
        if not length:  # an EAGLE head behind a prompt of one token has no pair cached yet
            return torch.empty(0, dtype=torch.long, device=device)
        positions, exist = select_positions(row, torch.tensor(length, device=device), length, self.config)
        return positions[exist]


class StreamingWindow(_Chunks):
    """First and newest chunks, as many as retrieval would keep (the StreamingLLM baseline)."""

    @classmethod
    def of_size(cls, config: RetrievalConfig) -> StreamingWindow:
        """As large a window as retrieval would fill, a chunk of it the sink."""
        sink = min(max(config.sink, 1), config.top_k - 1)
        return cls(replace(config, sink=sink, recent=config.top_k - sink))


class CrossModelRetrieval(_Chunks):
    """The chunks the target's last layer attends to most, and always the newest."""

    reads_attention = True


def retriever(kind: str, config: RetrievalConfig) -> Retriever:
    """The retriever behind `--draft_cache`."""
    if kind == "full":
        return NoRetrieval()
    return {"streaming": StreamingWindow.of_size, "retrieval": CrossModelRetrieval}[kind](config)


def select_positions(
    row: Tensor | None, length: Tensor, capacity: int, config: RetrievalConfig
) -> tuple[Tensor, Tensor]:
    """The tokens of the chunks to keep: first and newest, and those the target attends to most.

    Every shape is known beforehand and `length` may lie on a GPU, so that a captured graph serves every length.

    Args:
        row: [N] attention over the context, float32, anything beyond `length`; None asks for nothing.
        length: [] tokens in the context.
        capacity: most tokens that `length` may be.
    Returns:
        positions [K * chunk_size], ascending, and which of them exist, bool: those that do not come last.
    """
    size, chunks = config.chunk_size, num_chunks(capacity, config.chunk_size)
    index, newest = torch.arange(chunks, device=length.device), (length - 1) // size
    if row is None:
        asked = torch.full((chunks,), float("-inf"), device=length.device)
    else:
        row = torch.nn.functional.pad(row, (0, max(0, chunks * size - len(row))))[: chunks * size]
        asked = chunk_scores(row, size, length)
    always = ((index < config.sink) | (index > newest - config.recent)) & (index <= newest)
    asked = torch.where(always, float("inf"), asked)
    kept = asked.topk(min(config.top_k, chunks)).indices.sort().values
    positions = (kept[:, None] * size + torch.arange(size, device=length.device)).flatten()
    # kept chunks stand in order: those that do not exist come last, and only the newest may be short
    exist = (positions < length) & (asked[kept] > float("-inf")).repeat_interleave(size)
    return positions, exist


def chunk_scores(attention: Tensor, chunk_size: int, length: Tensor | None = None) -> Tensor:
    """Mean attention each chunk of the context receives.

    Args:
        attention: [N] attention of the last accepted token over the committed context, float32.
        chunk_size: tokens per chunk; the last chunk may be shorter and is averaged over its own length.
        length: [] tokens that exist; None: N.
    Returns:
        [C] with C = ceil(N / chunk_size), -inf for chunks that do not exist.
    """
    length = torch.tensor(len(attention), device=attention.device) if length is None else length
    chunks = num_chunks(len(attention), chunk_size)
    attention = torch.nn.functional.pad(attention, (0, chunks * chunk_size - len(attention)))
    attention = torch.where(torch.arange(len(attention), device=attention.device) < length, attention, 0.0)
    index = torch.arange(chunks, device=attention.device)
    counts = (length - index * chunk_size).clamp(1, chunk_size)
    means = attention.view(chunks, chunk_size).sum(-1) / counts
    return torch.where(index * chunk_size < length, means, float("-inf"))


def num_chunks(length: int, chunk_size: int) -> int:
    return -(-length // chunk_size)
