"""The model's tokenizer for clients that count tokens before they ask, by the paths and names of vLLM."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from specextend.models.loading import LoadedModels
from specextend.serve.fields import refuse, require_text


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True)

    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True)

    tokens: list[int]


def router(models: LoadedModels, in_turn: Callable[..., Awaitable]) -> APIRouter:
    """Routes.

    Args:
        in_turn: runs a function in the one thread that tokenizes; a tokenizer's switches are no thread's own.
    """
    routes, tokenizer = APIRouter(), models.tokenizer

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> dict:
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        special = {name: getattr(tokenizer, name, None) for name in names}
        return {"tokenizer_class": type(tokenizer).__name__, "model_max_length": models.limit} | special

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict:
        try:
            require_text(body.prompt, "the text")
        except ValueError as error:
            raise refuse("prompt", str(error)) from error
        options = {"add_special_tokens": body.add_special_tokens, "split_special_tokens": False, "verbose": False}
        ids = (await in_turn(functools.partial(tokenizer, body.prompt, **options))).input_ids
        return {"tokens": ids, "count": len(ids), "max_model_len": models.limit}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict:
        if any(not 0 <= token < models.target.config.vocab_size for token in body.tokens):
            raise refuse("tokens", f"a token id lies outside 0 .. {models.target.config.vocab_size - 1}")
        return {"prompt": await in_turn(functools.partial(tokenizer.decode, body.tokens))}

    return routes
