"""What a request asks of the next token, as transformers' logits processors before the target's choice."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from specextend.models.loading import LoadedModels
from specextend.serve.fields import refuse
from specextend.serve.schema import GenerationRequest


def processors(body: GenerationRequest, prompt_tokens: int, models: LoadedModels) -> list[LogitsProcessor]:
    """In vLLM's order; none where the request asks for nothing. New ones for each answer, since some remember it."""
    rules: list[LogitsProcessor] = []
    if body.logit_bias:
        rules.append(SequenceBiasLogitsProcessor(_bias(body.logit_bias, models.target.config.vocab_size)))
    eos = sorted(models.eos_token_ids)
    if body.min_tokens and eos and not body.ignore_eos:
        rules.append(MinNewTokensLengthLogitsProcessor(prompt_tokens, body.min_tokens, eos, device=str(models.device)))
    if body.repetition_penalty not in (None, 1):
        rules.append(RepetitionPenaltyLogitsProcessor(float(body.repetition_penalty)))
    if body.presence_penalty or body.frequency_penalty:
        rules.append(UsePenalty(body.presence_penalty or 0.0, body.frequency_penalty or 0.0, prompt_tokens))
    return rules


def least_probability(body: GenerationRequest) -> list[LogitsProcessor]:
    """`min_p`, behind all other rules: a part of the best token's probability that the others must reach.

    It means probabilities at the request's temperature, which is applied later: p^(1/t) >= min_p * q^(1/t) where
    p >= min_p^t * q.
    """
    temperature = body.sampling(0).temperature
    return [MinPLogitsWarper(body.min_p**temperature)] if body.min_p and temperature else []


class UsePenalty(LogitsProcessor):
    """OpenAI's penalties on tokens that the answer has used.

    Args:
        presence: subtracted once.
        frequency: subtracted for every use.
        prompt_tokens: what stands before the answer, which does not count.
    """

    def __init__(self, presence: float, frequency: float, prompt_tokens: int):
        self._presence, self._frequency, self._prompt_tokens = presence, frequency, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] behind ids [1, n]."""
        uses = torch.bincount(input_ids[0, self._prompt_tokens :], minlength=scores.shape[-1])
        return scores - self._presence * (uses > 0) - self._frequency * uses


def _bias(given: dict[str, float], vocab_size: int) -> dict[tuple[int], float]:
    for token in given:
        if not (token.isascii() and token.isdigit() and int(token) < vocab_size):
            raise refuse("logit_bias", f"{token!r} is no token id of 0 .. {vocab_size - 1}")
    return {(int(token),): float(bias) for token, bias in given.items()}
