"""Middleware in front of the routes: API key, size of the body, count of requests by status."""

from __future__ import annotations

import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specextend.serve.errors import ApiError
from specextend.serve.metrics import CLIENT_GONE

PUBLIC_PATHS = ("/health",)  # need no key


class AuthMiddleware:
    """Plain ASGI middleware, so that a client's disconnect reaches the application.

    Args:
        api_key: clients must send it as bearer token; None: no key is needed.
        count: called with each request's status at its end.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int, count: Callable[[int], None]):
        self._app, self._max_body_bytes, self._count = app, max_body_bytes, count
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE

        async def counting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error.response()(scope, receive, counting_send)
        else:
            try:
                await self._app(scope, self._bounded(receive), counting_send)
            except Exception:  # answered with 500 further out
                status = 500
                raise
        finally:
            self._count(status)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._key is not None and scope["path"] not in PUBLIC_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            # compared whatever the rest looks like, in a time that tells nothing of the key
            same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), self._key)
            if not (same and kind.lower() == "bearer"):
                raise ApiError(
                    401, "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                    code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise ApiError(413, self._too_large(), code="request_too_large", headers={"Connection": "close"})

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` that counts the body, which need not say its length ahead."""
        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body_bytes:
                raise HTTPException(413, self._too_large(), headers={"Connection": "close"})
            return message

        return bounded

    def _too_large(self) -> str:
        return f"the request's body is larger than the {self._max_body_bytes} bytes this server takes"
