"""The routes: a request becomes a job, its events become an answer or a stream of server-sent events."""

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
from specextend.serve.schema import ChatRequest, CompletionRequest
from specextend.serve.settings import Settings
from specextend.serve.shapes import ChatShape, CompletionShape, Shape
from specextend.serve.worker import Job, Worker


def create_app(engine: SpecExtend, settings: Settings) -> FastAPI:
    """The application; its worker runs between start-up and shutdown, and lies in `app.state.worker`."""
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
    desk = RequestHandler(engine, settings, worker)
    model = {"id": settings.model_id, "object": "model", "created": int(time.time()), "owned_by": "specextend"}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        ids = await desk.admit(body.model, body.prompt)
        return await desk.answer(request, body, ids, CompletionShape(settings.model_id))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        ids = await desk.admit(body.model, body.conversation)
        return await desk.answer(request, body, ids, ChatShape(settings.model_id))

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict:
        desk.check_model(name)
        return model

    @app.get("/health")
    async def health() -> JSONResponse:
        stopping = worker.stopping
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(worker.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    return app


class RequestHandler:
    """Takes requests in and gives answers out."""

    def __init__(self, engine: SpecExtend, settings: Settings, worker: Worker):
        self._engine, self._settings, self._worker = engine, settings, worker
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")  # one: long texts queue instead of piling up

    def check_model(self, name: str) -> None:
        if name != self._settings.model_id:
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {self._settings.model_id!r}",
                code="model_not_found", param="model",
            )  # fmt: skip

    async def admit(self, model: str, prompt: str | list[int] | list[dict]) -> torch.Tensor:
        """The prompt's ids [N], once it is known to be one; long texts are tokenized beside the event loop."""
        self.check_model(model)
        self._worker.require_room()  # before the work of tokenizing
        ids = await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._encode, prompt)
        most = self._settings.max_prompt_tokens
        if most and len(ids) > most:
            raise ApiError(
                400, f"the prompt has {len(ids)} tokens, this server takes at most {most}",
                code="context_length_exceeded", param="prompt",
            )  # fmt: skip
        return ids

    async def answer(self, request: Request, body: CompletionRequest | ChatRequest, ids, shape: Shape) -> Response:
        """Wait for the turn; then the whole answer, or a stream as soon as there is something to send."""
        job = Job(ids, self._new_tokens(body.tokens_asked, len(ids)), body.sampling, body.stops)
        self._worker.submit(job)
        try:
            async with self._cancelled_when_gone(request, job):
                events = [await job.next()]
                while not body.stream and not isinstance(events[-1], Generation):
                    events.append(await job.next())
        except BaseException:
            self._worker.cancel(job)
            raise
        if body.stream:
            return _EventStream(self._worker, job, shape.stream(job, events[0], usage=body.wants_usage))
        return JSONResponse(shape.whole(events[-1]))

    def _encode(self, prompt: str | list[int] | list[dict]) -> torch.Tensor:
        models = self._engine.models
        if isinstance(prompt, str):
            ids = encode_prompt(prompt, None, models.tokenizer) if prompt.strip() else []
        elif prompt and isinstance(prompt[0], dict):
            return self._engine.encode_chat(prompt)
        else:
            ids = prompt
            known = models.target.config.vocab_size
            if any(not 0 <= token < known for token in ids):
                raise ApiError(400, f"a token id lies outside 0 .. {known - 1}", param="prompt", code="invalid_value")
        if not ids:
            raise ApiError(400, "the prompt is empty; give at least one word", param="prompt", code="invalid_value")
        return torch.tensor(ids, device=models.device)

    def _new_tokens(self, asked: int | None, prompt_tokens: int) -> int:
        """New tokens to make at most; ApiError where the model or the server allows fewer than asked."""
        limit = self._engine.limit
        room = limit - prompt_tokens
        most = self._settings.max_new_tokens or limit
        if asked is not None and asked > most:
            raise ApiError(
                400, f"max_tokens is {asked}, this server makes at most {most}", param="max_tokens",
                code="invalid_value",
            )  # fmt: skip
        if room < (asked or 1):
            raise ApiError(
                400, f"this model holds {limit} tokens; the prompt has {prompt_tokens} and {asked or 1} more are asked "
                "for. Shorten one of them", code="context_length_exceeded", param="prompt",
            )  # fmt: skip
        return min(room, most) if asked is None else asked

    @asynccontextmanager
    async def _cancelled_when_gone(self, request: Request, job: Job) -> AsyncIterator[None]:
        """Inside, a client that hangs up ends its job; `job.next` then raises."""

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
    """Server-sent events; whatever ends the response ends the job."""

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
