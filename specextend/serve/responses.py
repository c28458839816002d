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
from specextend.serve.tool_calls import end_of_text, find_calls
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
    """What came of one choice so far.

    Attributes:
        sent: characters of the text, and named: characters of the tokens, that chunks have told.
    """

    text: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    sent: int = 0
    named: int = 0
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
        parts = []
        for index, choice in enumerate(choices):
            content, reason = self._content(choice)
            scores = self._scores(choice, choice.scores)
            parts.append({"index": index, **content, "logprobs": scores, "finish_reason": reason})
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
            choice.add(event)
            if isinstance(event, Piece):
                scores = self._scores(choice, event.scores)
                text, choice.sent = choice.text[choice.sent : self._end(choice.text)], self._end(choice.text)
                if text or scores:
                    yield self._chunk(event.index, self._delta(text), scores)
            else:
                deltas, reason = self._last_deltas(choice)
                for delta in deltas:
                    yield self._chunk(event.index, delta)
                yield self._chunk(event.index, self._delta(""), finish_reason=reason)
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

    def _end(self, text: str) -> int:
        """How much of a growing answer may be sent."""
        return len(text)

    def _last_deltas(self, choice: Choice) -> tuple[list[dict], str]:
        """What is left to send of a complete choice, and why it ended."""
        return [], choice.finish_reason

    def _scores(self, choice: Choice, scores: Sequence[TokenScore]) -> dict | None:
        """The log-probabilities of a choice's next tokens."""
        if self._body.scored is None:
            return None
        written = self._written(scores, choice.named)
        choice.named += sum(len(self._names(score.token)) for score in scores)
        return written

    @abstractmethod
    def _written(self, scores: Sequence[TokenScore], offset: int) -> dict:
        """Log-probabilities as this kind of response writes them."""

    @abstractmethod
    def _content(self, choice: Choice) -> tuple[dict, str]:
        """The field of a choice that holds the whole answer, and why it ended."""

    @abstractmethod
    def _delta(self, text: str) -> dict:
        """The field of a choice that holds a chunk's text."""


class CompletionBuilder(Builder):
    prefix, object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def _written(self, scores: Sequence[TokenScore], offset: int) -> dict:
        return self._names.completion(scores, offset)

    def _content(self, choice: Choice) -> tuple[dict, str]:
        return self._delta(choice.text), choice.finish_reason

    def _delta(self, text: str) -> dict:
        return {"text": text}


class ChatBuilder(Builder):
    prefix, object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def _first_deltas(self) -> list[dict]:
        return [{"delta": {"role": "assistant", "content": ""}}]

    def _written(self, scores: Sequence[TokenScore], offset: int) -> dict:
        return self._names.chat(scores)

    def _end(self, text: str) -> int:
        return end_of_text(text) if self._body.tool_names else len(text)

    def _last_deltas(self, choice: Choice) -> tuple[list[dict], str]:
        _, calls, reason = self._parts(choice)
        if calls:
            return [{"delta": {"tool_calls": [{"index": index, **call} for index, call in enumerate(calls)]}}], reason
        rest = choice.text[choice.sent :]
        return [self._delta(rest)] if rest else [], reason

    def _content(self, choice: Choice) -> tuple[dict, str]:
        text, calls, reason = self._parts(choice)
        message = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {"message": message}, reason

    def _parts(self, choice: Choice) -> tuple[str, list[dict], str]:
        """Text and calls of an answer, and why it ended."""
        reason = choice.finish_reason
        text, calls = find_calls(choice.text, self._body.tool_names) if self._body.tool_names else (choice.text, [])
        return text, calls, "tool_calls" if calls and reason == "stop" else reason

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
        "prompt_tokens_details": {"cached_tokens": sum(result.cached_tokens for result in results[::choices])},
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
