"""`POST /v1/responses`, OpenAI's newer form of a conversation: text in, text out; nothing is kept between requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from specextend.serve.fields import JsonSchema, Tokens, refuse, require_json_text
from specextend.serve.responses import Builder, Choice, Identity, usage_of
from specextend.serve.schema import ChatMessage, Conversation, GenerationRequest
from specextend.serve.worker import End, Job, Piece


class Format(JsonSchema):
    type: Literal["text", "json_object", "json_schema"]


class TextOptions(BaseModel):
    format: Format | None = None


def _as_messages(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesRequest(GenerationRequest):
    """Messages, or one text, and instructions in front of them."""

    prompt_field: ClassVar[str] = "input"

    input: Annotated[
        list[ChatMessage],
        Field(min_length=1),
        BeforeValidator(_as_messages, json_schema_input_type=str | list[ChatMessage]),
    ]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    text: TextOptions | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ResponsesRequest:
        if self.choices > 1:
            raise refuse("n", "a response has one answer; leave it out")
        for name in ("instructions", "text"):  # the response repeats them
            require_json_text(name, self.model_dump(include={name}))
        return self

    @property
    def prompts(self) -> list[Conversation]:
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        return [Conversation(messages=first + [one.as_template for one in self.input])]

    @property
    def limit_field(self) -> str:
        return super().limit_field if self.max_output_tokens is None else "max_output_tokens"

    @property
    def requested_tokens(self) -> int | None:
        return super().requested_tokens if self.max_output_tokens is None else self.max_output_tokens

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        form = self.text and self.text.format
        if not form or form.type == "text":
            return super().answer_schema
        return form.schema_ if form.type == "json_schema" else {"type": "object"}


class ResponsesBuilder(Builder):
    """A response with one message, or the events in which it grows."""

    prefix, object, chunk_object = "resp_", "response", "response"

    def __init__(self, identity: Identity, body: ResponsesRequest):
        super().__init__(identity, body)
        self._message_id = self._identity["id"].replace("resp", "msg")

    def full(self, choices: Sequence[Choice]) -> dict:
        (choice,) = choices
        complete = choice.finish_reason != "length"
        return self._response(
            "completed" if complete else "incomplete",
            output=[self._message("completed" if complete else "incomplete", [_part(choice.text)])],
            incomplete_details=None if complete else {"reason": "max_output_tokens"},
            usage=_usage(choice),
        )

    async def chunks(self, job: Job, events: AsyncIterator[Piece | End]) -> AsyncIterator[dict]:
        choice, number = Choice(), 0
        where = {"item_id": self._message_id, "output_index": 0, "content_index": 0}

        def event(kind: str, **fields: Any) -> dict:
            nonlocal number
            number += 1
            return {"type": f"response.{kind}", "sequence_number": number - 1, **fields}

        empty = self._response("in_progress")
        yield event("created", response=empty)
        yield event("in_progress", response=empty)
        yield event("output_item.added", output_index=0, item=self._message("in_progress", []))
        yield event("content_part.added", **where, part=_part(""))
        async for one in events:
            choice.add(one)
            if isinstance(one, Piece):
                yield event("output_text.delta", **where, delta=one.text, logprobs=[])
        response = self.full([choice])
        yield event("output_text.done", **where, text=choice.text, logprobs=[])
        yield event("content_part.done", **where, part=_part(choice.text))
        yield event("output_item.done", output_index=0, item=response["output"][0])
        yield event(response["status"], response=response)

    def _response(self, status: str, **fields: Any) -> dict:
        body = self._body
        rule = body.sampling(0)
        return {
            "id": self._identity["id"],
            "object": self.object,
            "created_at": self._identity["created"],
            "model": self._identity["model"],
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.requested_tokens,
            "metadata": {},
            "output": [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": rule.temperature,
            "text": {"format": (body.text and body.text.format or Format(type="text")).model_dump(by_alias=True)},
            "tool_choice": "none",
            "tools": [],
            "top_p": rule.top_p,
            "truncation": "disabled",
            "usage": None,
        } | fields

    def _message(self, status: str, content: list[dict]) -> dict:
        return {
            "id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content
        }  # fmt: skip

    def _written(self, scores, offset):
        raise NotImplementedError("a response tells no log-probabilities")

    _content = _delta = _written


def _part(text: str) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(choice: Choice) -> dict:
    counts = usage_of([choice.result])
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": counts["prompt_tokens_details"],
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": counts["completion_tokens_details"],
        "total_tokens": counts["total_tokens"],
    }
