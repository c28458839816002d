"""The types of a request's fields: what clients write in several ways becomes one form, checked once."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, StringConstraints

from specextend.serve.errors import ApiError

MAX_STOPS = 64
MAX_TOP_LOGPROBS = 20


def _as_integer(value: Any) -> Any:
    """4.0 is 4, as JavaScript's numbers have it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_stops(value: Any) -> Any:
    """One or several; an empty stop string stops nothing."""
    stops = [value] if isinstance(value, str) else [] if value is None else value
    return [stop for stop in stops if stop != ""] if isinstance(stops, list) else stops


def _as_prompts(value: Any) -> list[str] | list[list[int]]:
    """A text or token ids, one or several, as a list; each fault is told with its place."""
    if isinstance(value, str) or _is_ids(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError("give a text, a list of token ids, or a list of either")
    for index, prompt in enumerate(value):
        if not isinstance(prompt, str) and not _is_ids(prompt):
            raise ValueError(f"prompt {index} is neither a text nor a list of token ids")
        if not prompt:
            raise ValueError(f"prompt {index} is empty; give at least one word")
        if isinstance(prompt, str):
            require_text(prompt, f"prompt {index}")
    return value


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _as_parts(value: Any) -> Any:
    """A message's content as a list of parts."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else [] if value is None else value


def require_text(text: str, what: str) -> None:
    """ValueError for half of a surrogate pair: legal in JSON, but no text that could be tokenized."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds half a surrogate pair (character {error.start}); remove it") from None


def require_json_text(param: str, value: Any) -> None:
    """ApiError for half of a surrogate pair anywhere in a field."""
    try:
        require_text(json.dumps(value, ensure_ascii=False), "the value")
    except ValueError as error:
        raise refuse(param, str(error)) from error


def refuse(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """An error about the field `param`."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


class Part(BaseModel):
    """A piece of a message; other types than text are refused."""

    type: Literal["text", "input_text", "output_text"]
    text: str


class StreamOptions(BaseModel):
    include_usage: bool | None = False
    include_obfuscation: bool | None = False  # never done


class JsonSchema(BaseModel):
    """Named as clients write it; `strict` changes nothing, every schema is kept to."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_(self) -> dict[str, Any] | None:
        """The JSON schema that the answer follows, None where it is free."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise refuse("response_format", "the type is json_schema, but json_schema is missing")
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


Integer = BeforeValidator(_as_integer)
Tokens = Annotated[int, Integer, Field(ge=1)]
Prompts = Annotated[
    list, PlainValidator(_as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
]
Stop = Annotated[str, StringConstraints(max_length=256)]
Stops = Annotated[
    list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_as_stops, json_schema_input_type=str | list[str] | None)
]
Parts = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None)]
TopLogprobs = Annotated[int, Integer, Field(ge=0, le=MAX_TOP_LOGPROBS)]
