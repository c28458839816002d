"""The decoding thread: one request at a time, in the order of arrival; the others wait in a bounded queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from specextend.config import SamplingConfig
from specextend.decoding.output import Generation, Output, Round
from specextend.decoding.text import TextStream
from specextend.engine import SpecExtend
from specextend.serve.errors import ApiError
from specextend.serve.metrics import CLIENT_GONE, Metrics


class Cancelled(Exception):
    """Raised into a generation whose client has gone."""


@dataclass(eq=False)
class Job:
    """A request under way, created on the event loop that waits for it.

    Args:
        ids: [N] prompt.
    """

    ids: Tensor
    max_new_tokens: int
    sampling: SamplingConfig
    stop: list[str]
    arrived: float = field(default_factory=time.perf_counter)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _events: asyncio.Queue = field(default_factory=asyncio.Queue)
    error: ApiError | None = None  # why it was cancelled

    def send(self, event: str | Generation | Exception) -> None:
        """Pass a round's text, the result or a failure to the event loop; from any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next_event(self) -> str | Generation:
        """The next piece of text, or the result, which is the last; raises what went wrong."""
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event


class Worker:
    """Runs jobs one after the other in a thread of its own.

    Args:
        max_waiting: jobs that may wait beside the one that runs.
    """

    def __init__(self, engine: SpecExtend, max_waiting: int):
        self._engine, self._max_waiting = engine, max_waiting
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self.metrics = Metrics(lambda: len(self._waiting), lambda: int(self.busy))

    @property
    def busy(self) -> bool:
        return self._running is not None

    @property
    def stopping(self) -> bool:
        return self._stopping

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; ApiError where the queue is full or the server is stopping."""
        with self._changed:
            self.check_queue()
            self._waiting.append(job)
            self._changed.notify_all()

    def check_queue(self) -> None:
        """ApiError 429 where too many wait, 503 where the server is stopping."""
        if self._stopping:
            raise _stopping()
        if len(self._waiting) >= self._max_waiting:
            raise ApiError(
                429, f"{self._max_waiting} requests are waiting already; try again later", code="queue_full",
                headers={"Retry-After": str(self._retry_after())},
            )  # fmt: skip

    def cancel(self, job: Job, error: ApiError | None = None) -> None:
        """End a job: at once if it waits, after its round if it runs; nothing if it is done."""
        with self._changed:
            job.error = job.error or error or ApiError(CLIENT_GONE, "the client has gone")
            if job in self._waiting:
                self._waiting.remove(job)
                job.send(job.error)

    def drain(self) -> None:
        """Refuse new and waiting jobs; the running one goes on."""
        with self._changed:
            self._stopping = True
            for job in list(self._waiting):
                self.cancel(job, _stopping())
            self._changed.notify_all()

    def stop(self) -> None:
        """Drain, cancel what still runs, and end the thread."""
        self.drain()
        with self._changed:
            if self._running is not None:
                self.cancel(self._running, _stopping())
        self._thread.join()

    def _retry_after(self) -> int:
        """Seconds until the running job may be done: a guess, as long as it has taken so far."""
        running = self._running
        return max(1, round(time.perf_counter() - running.arrived)) if running else 1

    def _work(self) -> None:
        while (job := self._take()) is not None:
            try:
                event: Generation | Exception = self._generate(job)
            except Cancelled:
                event = job.error
            except Exception as error:  # the thread must outlive any request
                event = ApiError.of(error)
            with self._changed:
                self._running = None
            job.send(event)

    def _take(self) -> Job | None:
        """The next job, now running; None when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

    def _generate(self, job: Job) -> Generation:
        if job.error is not None:
            raise Cancelled
        text: TextStream | None = None

        def on_round(output: Output, round_: Round | None) -> None:
            nonlocal text
            if round_ is None:
                text = TextStream(output.decode, job.stop)
                self.metrics.first_token.observe(time.perf_counter() - job.arrived)
            else:
                self.metrics.accepted.observe(round_.accepted)
            # set here, where no cache is growing, rather than read by whoever asks for the metrics
            self.metrics.cache_bytes.set(self._engine.cache_bytes)
            self.metrics.tokens.inc(len(round_.tokens) if round_ else 1)
            if job.error is not None:
                raise Cancelled
            piece = text.push(output.token_ids, last=output.finished)
            if piece:
                job.send(piece)

        result = self._engine.generate(
            job.ids, job.max_new_tokens, sampling=job.sampling, stop=job.stop, on_round=on_round
        )
        self.metrics.finished(result)
        return result


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "30"})
