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
class StreamingWindow:
    """First and newest chunks, as many as retrieval would keep (the StreamingLLM baseline)."""

    config: RetrievalConfig
    reads_attention = False

    @classmethod
    def of_size(cls, config: RetrievalConfig) -> StreamingWindow:
        """As large a window as retrieval would fill, a chunk of it the sink."""
        sink = min(max(config.sink, 1), config.top_k - 1)
        return cls(replace(config, sink=sink, recent=config.top_k - sink))

    def is_due(self, rounds: int, length: int) -> bool:
        return _is_due(self.config, rounds, length)

    def select(self, attention: Callable[[], Tensor], length: int) -> Tensor:
        chunks = torch.arange(num_chunks(length, self.config.chunk_size))
        kept = chunks[(chunks < self.config.sink) | (chunks >= len(chunks) - self.config.recent)]
        return chunk_positions(kept, self.config.chunk_size, length)


@dataclass(frozen=True)
class CrossModelRetrieval:
    """The chunks the target's last layer attends to most, and always the newest."""

    config: RetrievalConfig
    reads_attention = True

    def is_due(self, rounds: int, length: int) -> bool:
        return _is_due(self.config, rounds, length)

    def select(self, attention: Callable[[], Tensor], length: int) -> Tensor:
        scores = chunk_scores(attention()[:length], self.config.chunk_size)
        scores[: self.config.sink] = float("inf")
        scores[-self.config.recent :] = float("inf")
        chunks = scores.topk(min(self.config.top_k, len(scores))).indices.sort().values
        return chunk_positions(chunks, self.config.chunk_size, length)


def retriever(kind: str, config: RetrievalConfig) -> Retriever:
    """The retriever behind `--draft_cache`."""
    if kind == "full":
        return NoRetrieval()
    return {"streaming": StreamingWindow.of_size, "retrieval": CrossModelRetrieval}[kind](config)


def _is_due(config: RetrievalConfig, rounds: int, length: int) -> bool:
    overflows = length > config.top_k * config.chunk_size
    return rounds == 0 or (overflows and rounds % config.every_n_steps == 0)


def chunk_scores(attention: Tensor, chunk_size: int) -> Tensor:
    """Mean attention each chunk of the context receives.

    Args:
        attention: [N] attention of the last accepted token over the committed context, float32.
        chunk_size: tokens per chunk; the last chunk may be shorter and is averaged over its own length.
    Returns:
        [C] with C = ceil(N / chunk_size).
    """
    if not len(attention):  # an EAGLE head behind a prompt of one token has no pair cached yet
        return attention
    chunks = num_chunks(len(attention), chunk_size)
    padded = torch.nn.functional.pad(attention, (0, chunks * chunk_size - len(attention)))
    means = padded.view(chunks, chunk_size).mean(-1)
    means[-1] = attention[(chunks - 1) * chunk_size :].mean()
    return means


def chunk_positions(chunks: Tensor, chunk_size: int, length: int) -> Tensor:
    """Positions [m] of the tokens in `chunks` [k], ascending; the last chunk of a context may be short."""
    offsets = torch.arange(chunk_size, device=chunks.device)
    positions = (chunks[:, None] * chunk_size + offsets).flatten()
    return positions[positions < length]


def num_chunks(length: int, chunk_size: int) -> int:
    return -(-length // chunk_size)
