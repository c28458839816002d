"""The routes: a request becomes a job of the worker, the job's events become a response or server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from specextend.data.templates import encode_prompt
from specextend.decoding.output import Generation
from specextend.engine import SpecExtend
from specextend.serve import errors
from specextend.serve.auth import AuthMiddleware
from specextend.serve.errors import ApiError
from specextend.serve.responses import ChatBuilder, CompletionBuilder, ResponseBuilder
from specextend.serve.schema import ChatRequest, CompletionRequest
from specextend.serve.settings import Settings
from specextend.serve.worker import Job, Worker


def create_app(engine: SpecExtend, settings: Settings) -> FastAPI:
    """The application; its worker (`app.state.worker`) runs between start-up and shutdown."""
    worker = Worker(engine, settings.max_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="SpecExtend", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker = worker
    app.add_middleware(
        AuthMiddleware, api_key=settings.api_key, max_body_bytes=settings.max_body_bytes,
        count=lambda status: worker.metrics.requests.labels(str(status)).inc(),
    )  # fmt: skip
    errors.register(app)
    handler = RequestHandler(engine, settings, worker)
    model = {"id": settings.model_id, "object": "model", "created": int(time.time()), "owned_by": "specextend"}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        ids = await handler.encode(body.model, body.prompt)
        return await handler.respond(request, body, ids, CompletionBuilder(settings.model_id))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        ids = await handler.encode(body.model, body.conversation)
        return await handler.respond(request, body, ids, ChatBuilder(settings.model_id))

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict:
        handler.check_model(name)
        return model

    @app.get("/health")
    async def health() -> JSONResponse:
        stopping = worker.stopping
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(worker.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return app


class RequestHandler:
    """Checks and tokenizes requests, runs them on the worker and sends the responses."""

    def __init__(self, engine: SpecExtend, settings: Settings, worker: Worker):
        self._engine, self._settings, self._worker = engine, settings, worker
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")  # one thread: long texts queue

    def check_model(self, name: str) -> None:
        if name != self._settings.model_id:
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {self._settings.model_id!r}",
                code="model_not_found", param="model",
            )  # fmt: skip

    async def encode(self, model: str, prompt: str | list[int] | list[dict]) -> torch.Tensor:
        """Token ids [N] of a text, of ids or of messages, tokenized outside the event loop; ApiError where refused."""
        self.check_model(model)
        self._worker.check_queue()  # before the work of tokenizing
        ids = await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._encode, prompt)
        most = self._settings.max_prompt_tokens
        if most and len(ids) > most:
            raise ApiError(
                400, f"the prompt has {len(ids)} tokens, this server takes at most {most}",
                code="context_length_exceeded", param="prompt",
            )  # fmt: skip
        return ids

    async def respond(
        self, request: Request, body: CompletionRequest | ChatRequest, ids: torch.Tensor, builder: ResponseBuilder
    ) -> Response:
        """Queue the request for prompt `ids` [N]; the whole response, or a stream from the first text on."""
        job = Job(ids, self._new_tokens(body.requested_tokens, len(ids)), body.sampling, body.stops)
        self._worker.submit(job)
        try:
            async with self._cancelled_when_gone(request, job):
                events = [await job.next_event()]
                while not body.stream and not isinstance(events[-1], Generation):
                    events.append(await job.next_event())
        except BaseException:
            self._worker.cancel(job)
            raise
        if body.stream:
            return _EventStream(self._worker, job, builder.chunks(job, events[0], usage=body.wants_usage))
        return JSONResponse(builder.full(events[-1]))

    def _encode(self, prompt: str | list[int] | list[dict]) -> torch.Tensor:
        models = self._engine.models
        if isinstance(prompt, str):
            ids = encode_prompt(prompt, None, models.tokenizer) if prompt.strip() else []
        elif prompt and isinstance(prompt[0], dict):
            return self._engine.encode_chat(prompt)
        else:
            ids = prompt
            vocab_size = models.target.config.vocab_size
            if any(not 0 <= token < vocab_size for token in ids):
                raise ApiError(
                    400, f"a token id lies outside 0 .. {vocab_size - 1}", param="prompt", code="invalid_value"
                )
        if not ids:
            raise ApiError(400, "the prompt is empty; give at least one word", param="prompt", code="invalid_value")
        return torch.tensor(ids, device=models.device)

    def _new_tokens(self, requested: int | None, prompt_tokens: int) -> int:
        """New tokens to generate at most; ApiError where the model holds fewer than requested.

        The server's own limit shortens the response instead, whose finish reason is then "length".
        """
        limit = self._engine.limit
        if requested is not None and requested > limit:
            raise ApiError(
                400, f"max_tokens is {requested}, this model holds {limit} tokens", param="max_tokens",
                code="invalid_value",
            )  # fmt: skip
        available = limit - prompt_tokens
        allowed = self._settings.max_new_tokens or limit
        needed = 1 if requested is None else min(requested, allowed)
        if available < needed:
            raise ApiError(
                400, f"this model holds {limit} tokens; the prompt has {prompt_tokens} and {needed} more are asked "
                "for. Shorten one of them", code="context_length_exceeded", param="prompt",
            )  # fmt: skip
        return min(available, allowed, self._settings.default_max_tokens) if requested is None else needed

    @asynccontextmanager
    async def _cancelled_when_gone(self, request: Request, job: Job) -> AsyncIterator[None]:
        """Inside, a client that hangs up ends its job; `job.next_event` then raises."""

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self._worker.cancel(job)

        watcher = asyncio.create_task(watch())
        try:
            yield
        finally:
            watcher.cancel()


class _EventStream(StreamingResponse):
    """Server-sent events; the job ends with the response, whatever ends that."""

    def __init__(self, worker: Worker, job: Job, chunks: AsyncIterator[dict]):
        super().__init__(_lines(chunks), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._worker, self._job = worker, job

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._job)


async def _lines(chunks: AsyncIterator[dict]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    except ApiError as error:  # the status is sent already
        yield f"data: {json.dumps(error.body)}\n\n"
        return
    yield "data: [DONE]\n\n"
