"""The application: its routes, and what stands around all of them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from specextend.engine import SpecExtend
from specextend.serve import errors, tokens
from specextend.serve.auth import AuthMiddleware
from specextend.serve.envelope import HEADER, EnvelopeMiddleware
from specextend.serve.handler import RequestHandler
from specextend.serve.logprobs import TokenNames
from specextend.serve.responses import ChatBuilder, CompletionBuilder, Identity
from specextend.serve.responses_api import ResponsesBuilder, ResponsesRequest
from specextend.serve.schema import ChatRequest, CompletionRequest
from specextend.serve.settings import Settings
from specextend.serve.worker import Worker


def create_app(engine: SpecExtend, settings: Settings) -> FastAPI:
    """The application; its worker (`app.state.worker`) runs between start-up and shutdown."""
    worker = Worker(engine, settings.max_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(
        title="SpecExtend", lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={"4XX": {"model": errors.ErrorBody, "description": "The request is refused"}},
    )  # fmt: skip
    app.state.worker = worker
    app.add_middleware(
        AuthMiddleware, settings=settings,
        count=lambda status: worker.metrics.requests.labels(str(status)).inc(),
    )  # fmt: skip
    app.add_middleware(EnvelopeMiddleware)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=[HEADER],
        )  # fmt: skip
    errors.register(app)
    handler = RequestHandler(engine, settings, worker)
    app.include_router(tokens.router(engine.models, handler.in_turn))
    identity = Identity(settings.model_id, _fingerprint(engine), TokenNames(engine.models.tokenizer))
    model = {"id": settings.model_id, "object": "model", "created": int(time.time()), "owned_by": "specextend"}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await handler.respond(request, body, CompletionBuilder(identity, body))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await handler.respond(request, body, ChatBuilder(identity, body))

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return await handler.respond(request, body, ResponsesBuilder(identity, body))

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict:
        handler.check_model(name)
        return model

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "failed" if worker.failed else "stopping" if worker.stopping else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(worker.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return app


def _fingerprint(engine: SpecExtend) -> str:
    """Changes with all that decides what a seed gives: models, precision, device; not with the draft."""
    models = engine.models
    facts = models.name, models.dtype, models.device.type, models.target.config.to_json_string()
    return f"fp_{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"
