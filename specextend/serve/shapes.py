"""Answers as OpenAI's API has them, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Protocol

from specextend.decoding.output import Generation
from specextend.serve.worker import Job

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class Shape(Protocol):
    """How one kind of answer looks."""

    def whole(self, result: Generation) -> dict:
        """The finished answer."""

    def stream(self, job: Job, first: str | Generation, *, usage: bool) -> AsyncIterator[dict]:
        """The job's answer in chunks, as its rounds end.

        Args:
            first: the job's first event, taken already.
            usage: end with a chunk that counts tokens.
        """


class _Shape:
    """What the two kinds share: an identity, and who comes when."""

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, model: str):
        self._identity = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, result: Generation) -> dict:
        choice = {"index": 0, **self._content(result.text), "logprobs": None}
        choice["finish_reason"] = REASONS[result.finish_reason]
        return {**self._identity, "object": self.object, "choices": [choice], "usage": usage_of(result)}

    async def stream(self, job: Job, first: str | Generation, *, usage: bool) -> AsyncIterator[dict]:
        more = {"usage": None} if usage else {}
        for opening in self._openings():
            yield self._chunk(opening, None) | more
        event = first
        while not isinstance(event, Generation):
            yield self._chunk(self._piece(event), None) | more
            event = await job.next()
        yield self._chunk(self._piece(""), REASONS[event.finish_reason]) | more
        if usage:
            yield {**self._identity, "object": self.chunk_object, "choices": [], "usage": usage_of(event)}

    def _chunk(self, content: dict, reason: str | None) -> dict:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return {**self._identity, "object": self.chunk_object, "choices": [choice]}

    def _openings(self) -> list[dict]:
        return []

    def _content(self, text: str) -> dict:
        raise NotImplementedError

    def _piece(self, text: str) -> dict:
        raise NotImplementedError


class CompletionShape(_Shape):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> dict:
        return {"text": text}

    _piece = _content


class ChatShape(_Shape):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _openings(self) -> list[dict]:
        return [{"delta": {"role": "assistant", "content": ""}}]

    def _content(self, text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, text: str) -> dict:
        return {"delta": {"content": text} if text else {}}


def usage_of(result: Generation) -> dict:
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.new_tokens,
        "total_tokens": result.prompt_tokens + result.new_tokens,
    }
