"""Requests of OpenAI's API; what is not supported is refused by name, unless its value changes nothing."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from specextend.config import SamplingConfig
from specextend.serve.fields import (
    Integer,
    Parts,
    Prompts,
    ResponseFormat,
    Stops,
    StreamOptions,
    Tokens,
    TopLogprobs,
    refuse,
    require_json_text,
    require_text,
)

# values of unsupported fields that change nothing; null never does
NEUTRAL: dict[str, tuple] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "echo": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "chat_template_kwargs": ({},),
    "truncation": ("disabled",),
    "background": (False,),
    "include": ([],),
}
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "verbosity", "reasoning_effort", "reasoning", "cache_prompt",
)  # fmt: skip
LARGEST_SEED = 2**63 - 1
MAX_CHOICES = 1024  # of one request


class GenerationRequest(BaseModel):
    """What all kinds of request have; the fields behind `stream_options` are other servers', as vLLM names them.

    Args:
        seed: of the sampling noise, of the first choice; without one, or at -1, it is drawn anew.
        top_p: 0 leaves the most probable token alone.
        top_k: 0 and -1 are off.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    prompt_field: ClassVar[str]
    default_tokens: ClassVar[int | None] = None  # None: the server's

    model: str
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    n: Annotated[int, Integer, Field(ge=1, le=128)] | None = None
    best_of: Annotated[int, Integer] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Integer, Field(ge=-1, le=LARGEST_SEED)] | None = None
    stop: Stops = []
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Integer, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Integer, Field(ge=0)] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _knows_what_it_got(self) -> GenerationRequest:
        for name, value in (self.model_extra or {}).items():
            if value is None or name in IGNORED or any(_same(value, one) for one in NEUTRAL.get(name, ())):
                continue
            if name in NEUTRAL:
                raise refuse(name, "this value is not supported by this server; leave it out", "unsupported_value")
            raise refuse(name, "this server does not know the field; leave it out", "unknown_parameter")
        if self.best_of not in (None, 1, self.choices):
            raise refuse("best_of", "only as many as n are supported; leave it out", "unsupported_value")
        if self.answer_schema is not None and (self.min_tokens or self.ignore_eos):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise refuse(name, "an answer in a given format ends where the format does; leave one of them out")
        return self

    @property
    def prompts(self) -> list:
        """What is to be continued: texts, token ids or conversations."""
        raise NotImplementedError

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    def sampling(self, choice: int) -> SamplingConfig:
        """The rule of one of `n` choices. OpenAI's defaults: temperature 1, and the whole distribution."""
        seed = secrets.randbits(63) if self.seed in (None, -1) else (self.seed + choice) % (LARGEST_SEED + 1)
        return SamplingConfig(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p or 1e-9,
            top_k=max(self.top_k or 0, 0),
            seed=seed,
        )

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema that the answer follows, None where it is free."""
        return self.response_format and self.response_format.schema_

    @property
    def echoes(self) -> bool:
        """Whether the prompt stands before the answer."""
        return False

    @property
    def scored(self) -> int | None:
        """How many alternatives are told with the log-probability of each token; None: not even its own."""
        return None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def limit_field(self) -> str:
        """The field that limits the answer."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def requested_tokens(self) -> int | None:
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.default_tokens if given is None else given


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`; the prompts as they are, without a conversation template.

    Args:
        max_tokens: 0 with `echo`, for the log-probabilities of the prompt alone.
        logprobs: how many alternatives to each token are told; 0: its own log-probability.
    """

    prompt_field: ClassVar[str] = "prompt"
    default_tokens: ClassVar[int] = 16  # OpenAI's

    prompt: Prompts
    echo: bool | None = False
    max_tokens: Annotated[int, Integer, Field(ge=0)] | None = None
    logprobs: TopLogprobs | None = None

    @model_validator(mode="before")
    @classmethod
    def _false_is_none(cls, fields: Any) -> Any:
        unasked = isinstance(fields, dict) and fields.get("logprobs") is False
        return fields | {"logprobs": None} if unasked else fields

    @model_validator(mode="after")
    def _asks_for_something(self) -> CompletionRequest:
        if self.requested_tokens == 0 and not self.echo:
            raise refuse("max_tokens", "0 new tokens are asked for; give at least 1, or echo the prompt")
        if len(self.prompt) * self.choices > MAX_CHOICES:
            raise refuse("prompt", f"more than {MAX_CHOICES} answers are asked for at once; send several requests")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return self.prompt

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    @property
    def scored(self) -> int | None:
        return self.logprobs


class Function(BaseModel):
    """A call, its arguments as a JSON text or, as templates expect them, as an object."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class ToolFunction(BaseModel):
    """What is called; its description is the template's business."""

    model_config = ConfigDict(extra="allow")

    name: str


class Tool(BaseModel):
    type: Literal["function"]
    function: ToolFunction


class ChatMessage(BaseModel):
    """One turn; a tool's result names the call it answers."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Parts = []
    name: str | None = None  # not shown to the model
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_content(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("content") is None and not fields.get("tool_calls"):
            raise ValueError("content is missing")
        return fields

    @model_validator(mode="after")
    def _is_text(self) -> ChatMessage:
        require_text(self.text, "the text")
        return self

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)

    @property
    def as_template(self) -> dict[str, Any]:
        """The message as conversation templates read it."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [_call_of(call) for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class Conversation(BaseModel):
    """Messages for the model's conversation template, and what else that is told."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = {}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`; without a limit the server's `default_max_tokens` holds.

    Args:
        chat_template_kwargs: variables for the model's own chat template.
    """

    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise refuse("top_logprobs", "it needs logprobs=true")
        if self.tool_choice not in (None, "none", "auto"):
            raise refuse("tool_choice", "give auto or none: no call can be forced", "unsupported_value")
        require_json_text("tools", self._tools)
        require_json_text("chat_template_kwargs", self.chat_template_kwargs)
        return self

    @property
    def tool_names(self) -> set[str]:
        """Of the tools that the answer may call."""
        return {tool["function"]["name"] for tool in self._tools or []}

    @property
    def _tools(self) -> list[dict[str, Any]] | None:
        offered = None if self.tool_choice == "none" else self.tools
        return offered and [tool.model_dump(exclude_unset=True) for tool in offered]

    @property
    def prompts(self) -> list[Conversation]:
        return [
            Conversation(
                messages=[one.as_template for one in self.messages],
                tools=self._tools,
                variables=self.chat_template_kwargs or {},
            )
        ]

    @property
    def scored(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and true is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _call_of(call: ToolCall) -> dict[str, Any]:
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise refuse("messages", f"the arguments of the call of {call.function.name} are no JSON") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
