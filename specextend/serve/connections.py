"""Connections: how many, how long one may take to ask, and clients that stop sending but still listen."""

from __future__ import annotations

import asyncio
import functools

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from specextend.serve.settings import Settings

FIRST_PROBE_S, LAST_PROBE_S = 0.02, 1.0
FILES_OF_OUR_OWN, MANY_FILES = 64, 2**20
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # an interim answer, which clients skip


def server_config(app: FastAPI, settings: Settings, **options) -> uvicorn.Config:
    """How uvicorn serves `app`."""
    files = _most_files()
    most = max(1, min(settings.max_connections, files - FILES_OF_OUR_OWN))
    protocol = functools.partial(Connection, most=most, header_timeout_s=settings.header_timeout_s)
    # what asyncio accepts in one go, before any connection is closed, must not use up the files either
    backlog = max(32, min(2048, (files - most) // 2))
    return uvicorn.Config(
        app, http=protocol, backlog=backlog, timeout_graceful_shutdown=5, server_header=False, **options
    )


def _most_files() -> int:
    """That this process may have open."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MANY_FILES
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MANY_FILES if limit == resource.RLIM_INFINITY else limit


class Connection(H11Protocol):
    """uvicorn's connection with limits of its own.

    Args:
        most: connections at once; beyond, the one that has been idle for the longest makes room, and where all are
            busy, the new one is closed.
        header_timeout_s: within which a request's header is complete, or the connection ends.
    """

    def __init__(self, *args, most: int, header_timeout_s: float, **options):
        super().__init__(*args, **options)
        self._most, self._header_timeout_s = most, header_timeout_s
        self._header_timer: asyncio.TimerHandle | None = None
        self.idle_since = self.loop.time()

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_header()
        if len(self.connections) > self._most:
            idle = [one for one in self.connections if one.is_idle and one is not self]
            min(idle, key=lambda one: one.idle_since, default=self).drop()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.is_idle:
            self._stop_timer()
        elif self._header_timer is None:
            self._await_header()

    def on_response_complete(self) -> None:
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def eof_received(self) -> bool:
        """True keeps the connection: the client has sent its request and may still wait for the answer.

        It may as well have gone. Writing tells: a client that has gone resets the connection. Once an answer has begun
        there is nothing to write between its parts, and an end of sending counts as going.
        """
        waits = not self.is_idle and not self.cycle.more_body and not self.cycle.response_started
        if waits and self.scope["http_version"] == "1.1":
            self.cycle.keep_alive = False
            self._probe(FIRST_PROBE_S)
            return True
        return False

    def drop(self) -> None:
        """Close at once."""
        self.connections.discard(self)
        self.transport.abort()

    def _probe(self, wait_s: float) -> None:
        if self.is_idle or self.cycle.response_started or self.transport.is_closing():
            return
        self.transport.write(CONTINUE)
        self.loop.call_later(wait_s, self._probe, min(2 * wait_s, LAST_PROBE_S))

    def _await_header(self) -> None:
        self._header_timer = self.loop.call_later(self._header_timeout_s, self.drop)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
