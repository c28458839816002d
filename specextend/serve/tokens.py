"""The model's tokenizer for clients that count tokens before they ask, by the paths and names of vLLM."""

from __future__ import annotations

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


def router(models: LoadedModels) -> APIRouter:
    """Routes; they run in FastAPI's threads, outside the event loop."""
    routes, tokenizer = APIRouter(), models.tokenizer

    @routes.get("/tokenizer_info")
    def tokenizer_info() -> dict:
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        special = {name: getattr(tokenizer, name, None) for name in names}
        return {"tokenizer_class": type(tokenizer).__name__, "model_max_length": models.limit} | special

    @routes.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> dict:
        try:
            require_text(body.prompt, "the text")
        except ValueError as error:
            raise refuse("prompt", str(error)) from error
        ids = tokenizer(body.prompt, add_special_tokens=body.add_special_tokens, verbose=False).input_ids
        return {"tokens": ids, "count": len(ids), "max_model_len": models.limit}

    @routes.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> dict:
        if any(not 0 <= token < models.target.config.vocab_size for token in body.tokens):
            raise refuse("tokens", f"a token id lies outside 0 .. {models.target.config.vocab_size - 1}")
        return {"prompt": tokenizer.decode(body.tokens)}

    return routes
