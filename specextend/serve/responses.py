"""Responses of OpenAI's API, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

from specextend.decoding.output import Generation
from specextend.serve.worker import Job

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class ResponseBuilder(ABC):
    """Builds the response to one request; all its chunks have one id.

    Args:
        model: the model's name towards clients.
    """

    prefix: str  # of the id
    object: str
    chunk_object: str

    def __init__(self, model: str):
        self._identity = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def full(self, result: Generation) -> dict:
        """The whole response."""
        choice = {"index": 0, **self._content(result.text), "logprobs": None}
        choice["finish_reason"] = FINISH_REASONS[result.finish_reason]
        return {**self._identity, "object": self.object, "choices": [choice], "usage": usage_of(result)}

    async def chunks(self, job: Job, first: str | Generation, *, usage: bool) -> AsyncIterator[dict]:
        """The response in chunks, one per decoding round that completes some text.

        Args:
            first: the job's first event, already taken from it.
            usage: end with a chunk that counts tokens.
        """
        extra = {"usage": None} if usage else {}
        for delta in self._first_deltas():
            yield self._chunk(delta, None) | extra
        event = first
        while not isinstance(event, Generation):
            yield self._chunk(self._delta(event), None) | extra
            event = await job.next_event()
        yield self._chunk(self._delta(""), FINISH_REASONS[event.finish_reason]) | extra
        if usage:
            yield {**self._identity, "object": self.chunk_object, "choices": [], "usage": usage_of(event)}

    def _chunk(self, delta: dict, finish_reason: str | None) -> dict:
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._identity, "object": self.chunk_object, "choices": [choice]}

    def _first_deltas(self) -> list[dict]:
        """Chunks before the first text."""
        return []

    @abstractmethod
    def _content(self, text: str) -> dict:
        """The field of a choice that holds the whole text."""

    @abstractmethod
    def _delta(self, text: str) -> dict:
        """The field of a choice that holds a chunk's text."""


class CompletionBuilder(ResponseBuilder):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> dict:
        return {"text": text}

    _delta = _content


class ChatBuilder(ResponseBuilder):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _first_deltas(self) -> list[dict]:
        return [{"delta": {"role": "assistant", "content": ""}}]

    def _content(self, text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict:
        return {"delta": {"content": text} if text else {}}


def usage_of(result: Generation) -> dict:
    """Token counts of a response."""
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.new_tokens,
        "total_tokens": result.prompt_tokens + result.new_tokens,
    }
