"""Answers that follow a JSON schema: a grammar decides which tokens may come next, the target chooses among them.

llguidance keeps the grammar; a matcher walks along the answer, and the engine asks it along the accepted path only.
"""

from __future__ import annotations

import json
from functools import cached_property

import torch
from torch import Tensor
from transformers import LogitsProcessor

from specextend.models.loading import LoadedModels
from specextend.serve.errors import ApiError
from specextend.serve.fields import refuse

try:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer
except ImportError:
    LLMatcher = None

# between a JSON text's tokens, as much as indentation takes; some models would go on with blanks for ever
WHITE_SPACE = r"\n? {0,12}"
FIELD = "response_format"


class Grammars:
    """Makes the matchers for one model's vocabulary."""

    def __init__(self, models: LoadedModels):
        self._models = models

    def compile(self, schema: dict) -> LLMatcher:
        """A matcher at the beginning of an answer to `schema`, to be copied for each; ApiError where it is none."""
        if LLMatcher is None:
            raise refuse(FIELD, "the server lacks llguidance, which it needs for it: pip install llguidance")
        if not self._models.eos_token_ids:
            raise refuse(FIELD, "this model has no token that ends an answer", "unsupported_value")
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_pattern": WHITE_SPACE}
            )
        except ValueError as error:
            raise _no_schema(error) from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _no_schema(matcher.get_error())
        return matcher

    @cached_property
    def _tokenizer(self):
        eos = sorted(self._models.eos_token_ids)
        try:
            return from_tokenizer(self._models.tokenizer, n_vocab=self._models.target.config.vocab_size, eos_token=eos)
        except ValueError as error:
            raise refuse(FIELD, f"not for this model's tokenizer ({error})", "unsupported_value") from error


class GrammarProcessor(LogitsProcessor):
    """Leaves the tokens that the grammar allows next; for one answer.

    Args:
        matcher: of this answer alone.
        prompt_tokens: what stands before the answer.
    """

    def __init__(self, matcher: LLMatcher, prompt_tokens: int):
        self._matcher, self._read = matcher, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V], -inf where the grammar forbids."""
        self._matcher.consume_tokens(input_ids[0, self._read :].tolist())
        self._read = input_ids.shape[1]
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise _no_schema(self._matcher.get_error())
        return scores.masked_fill(allowed.to(scores.device) == 0, float("-inf"))


def _no_schema(reason: object) -> ApiError:
    return refuse(FIELD, f"the JSON schema cannot be followed ({_line(reason)})", "invalid_json_schema")


def _line(reason: object) -> str:
    return " ".join(str(reason).split())[:300]
