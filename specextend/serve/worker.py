"""The decoding thread: one request at a time, in the order of arrival; the others wait in a bounded queue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor

from specextend.config import SamplingConfig
from specextend.decoding.output import Generation, Output, Round
from specextend.decoding.scoring import TokenScore, score
from specextend.decoding.text import TextStream
from specextend.engine import SpecExtend
from specextend.serve.errors import ApiError
from specextend.serve.logprobs import Recorder
from specextend.serve.metrics import CLIENT_GONE, Metrics


class Cancelled(Exception):
    """Raised into a generation whose client has gone."""


@dataclass(frozen=True, eq=False)
class Task:
    """One choice of a response: a prompt, how it is continued, and what is told of it.

    Args:
        ids: [N] prompt.
        max_new_tokens: 0 continues nothing.
        processors: of this task alone, since some remember what they saw.
        echo: text that stands before the answer.
        endless: whether the end of the text does not end the answer.
        scored: how many alternatives are told with each token's log-probability; None: not even its own.
    """

    ids: Tensor
    max_new_tokens: int
    sampling: SamplingConfig
    stop: list[str]
    processors: list[LogitsProcessor] = field(default_factory=list)
    echo: str | None = None
    scored: int | None = None
    endless: bool = False


@dataclass(frozen=True)
class Piece:
    """New text of a choice, and the scores of the tokens that came with it where they are asked for."""

    index: int
    text: str
    scores: Sequence[TokenScore] = ()


@dataclass(frozen=True)
class End:
    """A choice is complete."""

    index: int
    result: Generation


@dataclass(eq=False)
class Job:
    """A request under way, created on the event loop that waits for it; its tasks run one after the other.

    Args:
        client: whose it is; prefixes are known to the same client alone.
    Attributes:
        error: why it was cancelled.
    """

    tasks: list[Task]
    client: str | None = None
    arrived: float = field(default_factory=time.perf_counter)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _events: asyncio.Queue = field(default_factory=asyncio.Queue)
    _timer: asyncio.TimerHandle | None = None
    error: ApiError | None = None

    def limit(self, seconds: float, expire: Callable[[], None]) -> None:
        """Call `expire` after so many seconds, unless all events have been seen by then."""
        self._timer = self._loop.call_later(seconds, expire)

    def send(self, event: Piece | End | Exception | None) -> None:
        """Pass text, a result, a failure or the end (None) to the event loop; from any thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def check(self) -> None:
        """Cancelled where it has been; asked by the thread that decodes."""
        if self.error is not None:
            raise Cancelled

    async def events(self) -> AsyncIterator[Piece | End]:
        """What happens, up to the end; raises what went wrong."""
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            if self._timer is not None:
                self._timer.cancel()


class Worker:
    """Runs jobs one after the other in a thread of its own.

    Args:
        max_waiting: jobs that may wait beside the one that runs.
    """

    def __init__(self, engine: SpecExtend, max_waiting: int):
        self._engine, self._max_waiting = engine, max_waiting
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._stopping = self._failed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self.metrics = Metrics(lambda: len(self._waiting), lambda: int(self.busy))

    @property
    def busy(self) -> bool:
        return self._running is not None

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def failed(self) -> bool:
        """Whether the device is lost to this process: no later request could succeed."""
        return self._failed

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; ApiError where the queue is full or the server is stopping."""
        with self._changed:
            self.check_queue()
            self._waiting.append(job)
            self._changed.notify_all()

    def check_queue(self) -> None:
        """ApiError 429 where too many wait, 503 where the server is stopping or its device has failed."""
        if self._failed:
            raise _device_failed()
        if self._stopping:
            raise _stopping()
        if len(self._waiting) >= self._max_waiting:
            raise ApiError(
                429, f"{self._max_waiting} requests are waiting already; try again later", code="queue_full",
                headers={"Retry-After": str(self._retry_after())},
            )  # fmt: skip

    def cancel(self, job: Job, error: ApiError | None = None) -> None:
        """End a job: at once if it waits, else after its round or block; nothing if it is done."""
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
            event: Exception | None = None
            try:
                for index, task in enumerate(job.tasks):
                    job.send(End(index, self._run(job, index, task)))
            except Cancelled:
                event = job.error
            except Exception as error:  # the thread must outlive any request
                event = self._failure(error)
            with self._changed:
                self._running = None
            job.send(event)

    def _take(self) -> Job | None:
        """The next job, now running; None when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            self._running = self._waiting.popleft() if self._waiting else None
            return self._running

    def _failure(self, error: Exception) -> ApiError:
        """What a request is told of an error; after one of the device nobody else is let in."""
        told = ApiError.of(error)
        if isinstance(error, torch.AcceleratorError) or _is_lost(self._engine.models.device):
            with self._changed:
                self._failed, told = True, _device_failed()
                for waiting in list(self._waiting):
                    self.cancel(waiting, told)
        return told

    def _run(self, job: Job, index: int, task: Task) -> Generation:
        job.check()
        if task.echo is not None:
            told = task.scored
            scores = () if told is None else score(self._engine.models, task.ids, told, lambda _: job.check())
            job.send(Piece(index, task.echo, scores))
        if task.max_new_tokens == 0:
            return Generation(len(task.ids), [], "", "length", [], {})
        result = self._generate(job, index, task)
        self.metrics.finished(result, job.client)
        return result

    def _generate(self, job: Job, index: int, task: Task) -> Generation:
        text: TextStream | None = None
        recorder = None if task.scored is None else Recorder(task.scored)

        def on_round(output: Output, round_: Round | None) -> None:
            nonlocal text
            if round_ is None:
                text = TextStream(output.decode, task.stop)
                if index == 0:
                    self.metrics.first_token.observe(time.perf_counter() - job.arrived)
            else:
                self.metrics.add_round(round_)
            # set here, where no cache is growing, rather than read by whoever asks for the metrics
            self.metrics.cache_bytes.set(self._engine.cache_bytes)
            self.metrics.tokens.inc(len(round_.tokens) if round_ else 1)
            job.check()
            piece = text.push(output.token_ids, last=output.finished)
            scores = recorder.take(output.token_ids) if recorder else ()
            if piece or scores:
                job.send(Piece(index, piece, scores))

        processors = [recorder, *task.processors] if recorder else task.processors
        return self._engine.generate(
            task.ids, task.max_new_tokens, sampling=task.sampling, stop=task.stop, processors=processors,
            on_round=on_round, on_block=lambda *_: job.check(), prefix_scope=job.client,
            eos_token_ids=() if task.endless else None,
        )  # fmt: skip


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "30"})


def _is_lost(device: torch.device) -> bool:
    """Whether a GPU answers no more; an error there spoils everything that comes after."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _device_failed() -> ApiError:
    return ApiError(503, "the server's device has failed; it must be started again", code="device_error")
