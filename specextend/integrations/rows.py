"""Batches and padding: the rows of a batch one after the other, each without its padding, and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria

from specextend.errors import ConfigError

BY_ROW = {logits_process.__name__, stopping_criteria.__name__}  # whose classes judge each row by itself, but for these:
WHOLE = (
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process.SynthIDTextWatermarkLogitsProcessor,
)


@dataclass(frozen=True)
class Row:
    """A row of a batch.

    Attributes:
        index: its place among the batch's `rows`.
        padded: [1, N] as it was given; tokens [n] without the padding in front.
    """

    index: int
    rows: int
    padded: Tensor
    tokens: Tensor

    @property
    def padding(self) -> int:
        return self.padded.shape[1] - len(self.tokens)

    def of(self, processors: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
        """The batch's processors, for this row."""
        return list(processors) if self.rows == 1 and not self.padding else [_InRow(one, self) for one in processors]


def rows_of(input_ids: Tensor, mask: Tensor | None) -> Iterator[Row]:
    """The rows of `input_ids` [B, N]; `mask` [B, N] has zeros at their padding, which is left of all tokens."""
    for index, padded in enumerate(input_ids):
        tokens = padded if mask is None else padded[mask[index].bool()]
        yield Row(index, len(input_ids), padded[None], tokens)


def fault_of_mask(mask: Tensor | None) -> str | None:
    """What is wrong with an attention mask [B, N], None if nothing is."""
    if mask is None or bool(mask.all()):
        return None
    real = mask.bool().long()
    if bool((real.diff(dim=1) < 0).any()):
        return "an attention_mask with zeros behind ones: pad on the left"
    return None if bool(real[:, -1].all()) else "a row of padding alone: leave it away"


def are_usual(positions: Tensor, mask: Tensor | None, like: Tensor) -> bool:
    """Whether position ids count the tokens of each row of `like` [B, N], from 0."""
    real = torch.ones_like(like) if mask is None else mask.bool().long()
    given = positions.to(like.device)
    if given.shape[-1] != like.shape[1]:
        return False
    return bool(((given.expand_as(like) == real.cumsum(1) - 1) | (real == 0)).all())


def check_batch(
    rows: int, config: GenerationConfig, processors: LogitsProcessorList, criteria: StoppingCriteriaList, streamer
) -> None:
    """ConfigError for what cannot be asked of the rows of a batch one after the other."""
    if rows == 1:
        return
    strange = [one for one in (*processors, *criteria) if type(one).__module__ not in BY_ROW or isinstance(one, WHOLE)]
    ends = [one for one in criteria if not isinstance(one, stopping_criteria.MaxLengthCriteria)]
    has_eos = any(hasattr(one, "eos_token_id") for one in criteria)
    faults = {
        "a streamer": streamer is not None,
        "output_scores and output_logits": bool(
            config.return_dict_in_generate and (config.output_scores or config.output_logits)
        ),
        f"a {type(strange[0]).__name__}" if strange else "": bool(strange),
        "stopping criteria without eos_token_id, whose rows go on until all have ended,": bool(ends) and not has_eos,
    }
    for fault, found in faults.items():
        if found:
            raise ConfigError(
                f"specextend.custom_generate does not take {fault} with a batch of {rows} rows: give one at a time"
            )


def together(input_ids: Tensor, answers: Sequence[list[int]], pad: int) -> Tensor:
    """[B, N + new]: each row of `input_ids` [B, N] with its answer, the shorter ones padded."""
    longest = max(map(len, answers))
    padded = [[*answer, *[pad] * (longest - len(answer))] for answer in answers]
    return torch.cat((input_ids, torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)), dim=1)


class _InRow(LogitsProcessor):
    """A processor asked about one row as `generate` asks about all: with the padding, and in the row's place."""

    def __init__(self, processor: LogitsProcessor, row: Row):
        self._processor, self._row = processor, row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        row = self._row
        ids = torch.cat((row.padded[:, : row.padding], input_ids), dim=1).repeat(row.rows, 1)
        return self._processor(ids, scores.repeat(row.rows, 1))[row.index : row.index + 1]
