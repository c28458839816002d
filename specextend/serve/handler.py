"""A request becomes a job of the worker, the job's events become a response or server-sent events."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from specextend.engine import SpecExtend
from specextend.serve.errors import ApiError
from specextend.serve.prepare import Preparation
from specextend.serve.responses import Builder, Choice
from specextend.serve.schema import GenerationRequest
from specextend.serve.settings import Settings
from specextend.serve.worker import End, Job, Piece, Worker

T = TypeVar("T")


class RequestHandler:
    """Runs requests on the worker and sends the responses."""

    def __init__(self, engine: SpecExtend, settings: Settings, worker: Worker):
        self._settings, self._worker = settings, worker
        self._preparation = Preparation(engine, settings)
        self._preparing = ThreadPoolExecutor(1, "prepare")

    def check_model(self, name: str) -> None:
        if name != self._settings.model_id:
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {self._settings.model_id!r}",
                code="model_not_found", param="model",
            )  # fmt: skip

    async def in_turn(self, work: Callable[[], T]) -> T:
        """Run what tokenizes outside the event loop, in one thread: long texts queue."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work)

    async def respond(self, request: Request, body: GenerationRequest, builder: Builder) -> Response:
        """The whole response, or a stream from the first text on; ApiError where the request is refused."""
        self.check_model(body.model)
        self._worker.check_queue()  # before the work of tokenizing
        job = Job(await self.in_turn(functools.partial(self._preparation.tasks, body)), request.state.client)
        self._worker.submit(job)
        if seconds := self._settings.request_timeout_s:
            late = ApiError(504, f"the answer was not there after {seconds:g} s", code="request_timeout")
            job.limit(seconds, functools.partial(self._worker.cancel, job, late))
        events = job.events()
        try:
            async with self._cancelled_when_gone(request, job):
                if body.stream:
                    first = await anext(events)  # what goes wrong before it still has a status
                else:
                    choices = [Choice() for _ in job.tasks]
                    async for event in events:
                        choices[event.index].add(event)
        except BaseException:
            self._worker.cancel(job)
            raise
        if body.stream:
            return _EventStream(self._worker, job, builder.chunks(job, _behind(first, events)))
        return JSONResponse(builder.full(choices))

    @asynccontextmanager
    async def _cancelled_when_gone(self, request: Request, job: Job) -> AsyncIterator[None]:
        """Inside, a client that hangs up ends its job; `job.events` then raises."""

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


async def _behind(first: Piece | End, events: AsyncIterator[Piece | End]) -> AsyncIterator[Piece | End]:
    yield first
    async for event in events:
        yield event


async def _lines(chunks: AsyncIterator[dict]) -> AsyncIterator[str]:
    named = False
    try:
        async for chunk in chunks:
            named = "type" in chunk  # events of /v1/responses
            name = f"event: {chunk['type']}\n" if named else ""
            yield f"{name}data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    except ApiError as error:  # the status is sent already
        yield f"{'event: error' + chr(10) if named else ''}data: {json.dumps(error.body)}\n\n"
        return
    if not named:
        yield "data: [DONE]\n\n"
