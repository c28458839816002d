"""Requests of OpenAI's API; unsupported fields are refused by name, unless their value is neutral."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from specextend.config import SamplingConfig

# values of unsupported fields that change nothing
NEUTRAL: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls",
)  # fmt: skip

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False  # never done


class _Request(BaseModel):
    """Fields of both kinds of request.

    Args:
        top_k: ours, as other servers have it; 0 is off.
        seed: of the sampling noise; without one it is drawn anew.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name, neutral in NEUTRAL.items():
            if fields.get(name) is not None and not any(
                fields[name] == value and isinstance(fields[name], bool) == isinstance(value, bool) for value in neutral
            ):
                raise ValueError(f"{name} is not supported by this server; leave it out")
        return {name: value for name, value in fields.items() if name not in NEUTRAL and name not in IGNORED}

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream=true")
        return self

    @property
    def sampling(self) -> SamplingConfig:
        """OpenAI's defaults: temperature 1, and the whole distribution."""
        return SamplingConfig(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
        )

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def requested_tokens(self) -> int | None:
        return self.max_tokens


class CompletionRequest(_Request):
    """`POST /v1/completions`; the prompt as it is, without a conversation template."""

    prompt: str | list[str] | list[int] | list[list[int]]

    @field_validator("prompt")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> str | list[int]:
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ValueError(f"{len(prompt)} prompts are given; send one per request")
            prompt = prompt[0]
        if isinstance(prompt, str):
            _require_text(prompt)
        return prompt

    @property
    def requested_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default


class Part(BaseModel):
    """A piece of a message; other types than text are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None  # not shown to the model

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @model_validator(mode="after")
    def _is_text(self) -> ChatMessage:
        _require_text(self.text)
        return self


class ChatRequest(_Request):
    """`POST /v1/chat/completions`; without a limit the server's `default_max_tokens` holds."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def conversation(self) -> list[dict[str, str]]:
        names = {"developer": "system"}
        return [{"role": names.get(one.role, one.role), "content": one.text} for one in self.messages]

    @property
    def requested_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def _require_text(text: str) -> None:
    """Half of a surrogate pair is legal JSON, but no text that could be tokenized."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text holds half a surrogate pair; complete or remove it")
