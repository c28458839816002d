"""Around every request: an id to speak of it, and HEAD wherever there is GET."""

from __future__ import annotations

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"


class EnvelopeMiddleware:
    """Plain ASGI middleware, so that a client's disconnect reaches the application."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get(HEADER))
        head = scope["method"] == "HEAD"

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            elif head:
                message = message | {"body": b""}
            await send(message)

        await self._app(scope | {"method": "GET"} if head else scope, receive, marked)


def _request_id(given: str | None) -> str:
    """The client's own where it can be sent back, else a new one."""
    fits = given is not None and 0 < len(given) <= 128 and given.isascii() and given.isprintable()
    return given if fits else f"req_{uuid.uuid4().hex}"
