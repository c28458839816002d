"""From a request to the worker's tasks: prompts become token ids, limits are applied, rules for the tokens are made."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specextend.data.templates import encode_prompt
from specextend.engine import SpecExtend
from specextend.errors import InputError
from specextend.serve.errors import ApiError
from specextend.serve.fields import refuse
from specextend.serve.grammar import GrammarProcessor, Grammars, LLMatcher
from specextend.serve.rules import least_probability, processors
from specextend.serve.schema import Conversation, GenerationRequest
from specextend.serve.settings import Settings
from specextend.serve.worker import Task

Prompt = str | list[int] | Conversation


class Preparation:
    """Makes tasks for one engine. It may take long: tokenizing a long text, compiling a schema."""

    def __init__(self, engine: SpecExtend, settings: Settings):
        self._engine, self._settings, self._grammars = engine, settings, Grammars(engine.models)

    def tasks(self, body: GenerationRequest) -> list[Task]:
        """A task for every choice of every prompt; ApiError where one is refused."""
        prompts = [(prompt, self._encode(body, prompt)) for prompt in body.prompts]
        grammar = None if body.answer_schema is None else self._grammars.compile(body.answer_schema)
        limits = [self._new_tokens(body, len(ids)) for _, ids in prompts]
        return [
            self._task(body, choice, prompt, ids, limit, grammar)
            for (prompt, ids), limit in zip(prompts, limits, strict=True)
            for choice in range(body.choices)
        ]

    def _task(
        self, body: GenerationRequest, choice: int, prompt: Prompt, ids: Tensor, limit: int, grammar: LLMatcher | None
    ) -> Task:
        rules = processors(body, len(ids), self._engine.models)
        if grammar is not None:
            rules.append(GrammarProcessor(grammar.deep_copy(), len(ids)))
        rules += least_probability(body)
        echo = None
        if body.echoes:
            echo = prompt if isinstance(prompt, str) else self._engine.models.tokenizer.decode(ids.tolist())
        return Task(ids, limit, body.sampling(choice), body.stop, rules, echo, body.scored, bool(body.ignore_eos))

    def _encode(self, body: GenerationRequest, prompt: Prompt) -> Tensor:
        """Token ids [N] of a prompt."""
        models = self._engine.models
        if isinstance(prompt, Conversation):
            ids = self._encode_chat(body, prompt)
        elif isinstance(prompt, str):
            ids = torch.tensor(encode_prompt(prompt, None, models.tokenizer), device=models.device)
        else:
            vocab_size = models.target.config.vocab_size
            if any(not 0 <= token < vocab_size for token in prompt):
                raise refuse(body.prompt_field, f"a token id lies outside 0 .. {vocab_size - 1}")
            ids = torch.tensor(prompt, device=models.device)
        most = self._settings.max_prompt_tokens
        if most and len(ids) > most:
            raise _too_long(body, f"the prompt has {len(ids)} tokens, this server takes at most {most}")
        return ids

    def _encode_chat(self, body: GenerationRequest, prompt: Conversation) -> Tensor:
        try:
            return self._engine.encode_chat(prompt.messages, **_template_options(prompt))
        except InputError as error:
            blamed = {"tools": "tools", "options": "chat_template_kwargs"}.get(error.setting, body.prompt_field)
            raise refuse(blamed, str(error)) from error

    def _new_tokens(self, body: GenerationRequest, prompt_tokens: int) -> int:
        """New tokens to generate at most; ApiError where the model holds fewer than requested.

        The server's own limit shortens the response instead, whose finish reason is then "length".
        """
        requested, limit = body.requested_tokens, self._engine.limit
        if requested is not None and requested > limit:
            raise refuse(body.limit_field, f"{requested} are asked for, this model holds {limit} tokens")
        available = limit - prompt_tokens
        allowed = self._settings.max_new_tokens or limit
        needed = 1 if requested is None else min(requested, allowed)
        if available < needed:
            raise _too_long(
                body,
                f"this model holds {limit} tokens; the prompt has {prompt_tokens} and {needed} more are asked for. "
                "Shorten one of them",
            )
        return min(available, allowed, self._settings.default_max_tokens) if requested is None else needed


def _too_long(body: GenerationRequest, message: str) -> ApiError:
    return ApiError(400, message, param=body.prompt_field, code="context_length_exceeded")


def _template_options(prompt: Conversation) -> dict:
    """What a conversation tells the chat template beside its messages; ApiError for names that are not variables."""
    arguments = {"template", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
    for name in prompt.variables:
        if name in arguments or name in ("messages", "tokenizer"):
            raise refuse("chat_template_kwargs", f"{name} is no variable of a chat template")
    return prompt.variables | ({"tools": prompt.tools} if prompt.tools else {})
