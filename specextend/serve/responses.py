"""Responses of OpenAI's API, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from specextend.decoding.output import Generation
from specextend.decoding.scoring import TokenScore
from specextend.serve.logprobs import TokenNames
from specextend.serve.schema import GenerationRequest
from specextend.serve.worker import End, Job, Piece

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Identity:
    """Who answers.

    Args:
        model: its name towards clients.
        fingerprint: of all that decides what it answers to a seed.
        names: of its tokens.
    """

    model: str
    fingerprint: str
    names: TokenNames


@dataclass
class Choice:
    """What came of one choice so far."""

    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    result: Generation | None = None

    def add(self, event: Piece | End) -> None:
        if isinstance(event, End):
            self.result = event.result
        else:
            self.text += event.text
            self.scores += event.scores

    @property
    def finish_reason(self) -> str:
        return FINISH_REASONS[self.result.finish_reason]


class Builder(ABC):
    """Builds the response to one request; all its chunks have one id."""

    prefix: str  # of the id
    object: str
    chunk_object: str

    def __init__(self, identity: Identity, body: GenerationRequest):
        self._names, self._body = identity.names, body
        self._identity = {
            "id": f"{self.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": identity.model,
            "system_fingerprint": identity.fingerprint,
        }  # fmt: skip

    def full(self, choices: Sequence[Choice]) -> dict:
        """The whole response."""
        parts = [
            {
                "index": index,
                **self._content(choice.text),
                "logprobs": self._scores(choice.scores, 0),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        usage = usage_of([choice.result for choice in choices], self._body.choices)
        return {**self._identity, "object": self.object, "choices": parts, "usage": usage}

    async def chunks(self, job: Job, events: AsyncIterator[Piece | End]) -> AsyncIterator[dict]:
        """The response in chunks, one per decoding round that completes some text; at its end the tokens, if asked."""
        choices = [Choice() for _ in job.tasks]
        async for event in events:
            choice = choices[event.index]
            if not choice.text and not choice.scores:
                for delta in self._first_deltas():
                    yield self._chunk(event.index, delta)
            if isinstance(event, Piece):
                scores = self._scores(event.scores, len(choice.text))
                yield self._chunk(event.index, self._delta(event.text), scores)
            choice.add(event)
            if isinstance(event, End):
                yield self._chunk(event.index, self._delta(""), finish_reason=choice.finish_reason)
        if self._body.wants_usage:
            usage = usage_of([choice.result for choice in choices], self._body.choices)
            yield {**self._identity, "object": self.chunk_object, "choices": [], "usage": usage}

    def _chunk(self, index: int, delta: dict, scores: dict | None = None, finish_reason: str | None = None) -> dict:
        choice = {"index": index, **delta, "logprobs": scores, "finish_reason": finish_reason}
        usage = {"usage": None} if self._body.wants_usage else {}
        return {**self._identity, "object": self.chunk_object, "choices": [choice]} | usage

    def _first_deltas(self) -> list[dict]:
        """Chunks before the first text."""
        return []

    def _scores(self, scores: Sequence[TokenScore], offset: int) -> dict | None:
        """The log-probabilities of a choice or a chunk that begins `offset` characters into its text."""
        return None if self._body.scored is None else self._written(scores, offset)

    @abstractmethod
    def _written(self, scores: Sequence[TokenScore], offset: int) -> dict:
        """Log-probabilities as this kind of response writes them."""

    @abstractmethod
    def _content(self, text: str) -> dict:
        """The field of a choice that holds the whole text."""

    @abstractmethod
    def _delta(self, text: str) -> dict:
        """The field of a choice that holds a chunk's text."""


class CompletionBuilder(Builder):
    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def _written(self, scores: Sequence[TokenScore], offset: int) -> dict:
        return self._names.completion(scores, offset)

    def _content(self, text: str) -> dict:
        return {"text": text}

    _delta = _content


class ChatBuilder(Builder):
    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def _first_deltas(self) -> list[dict]:
        return [{"delta": {"role": "assistant", "content": ""}}]

    def _written(self, scores: Sequence[TokenScore], offset: int) -> dict:
        return self._names.chat(scores)

    def _content(self, text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict:
        return {"delta": {"content": text} if text else {}}


def usage_of(results: Sequence[Generation], choices: int = 1) -> dict:
    """Token counts of a response, in OpenAI's words; each prompt counts once, however many `choices` it has."""
    prompt_tokens = sum(result.prompt_tokens for result in results[::choices])
    new_tokens = sum(result.new_tokens for result in results)
    accepted, rejected = predictions(results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": rejected,
            "reasoning_tokens": 0,
        },
    }


def predictions(results: Sequence[Generation]) -> tuple[int, int]:
    """Draft tokens that were accepted, and that were not."""
    rounds = [round_ for result in results for round_ in result.rounds]
    accepted = sum(round_.accepted for round_ in rounds)
    return accepted, sum(round_.drafted for round_ in rounds) - accepted
