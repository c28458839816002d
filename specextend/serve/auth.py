"""Middleware in front of the routes: host, API key, size and time of the body, count of requests by status."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specextend.serve.errors import ApiError, BodyError
from specextend.serve.keys import Keyring
from specextend.serve.metrics import CLIENT_GONE
from specextend.serve.settings import Settings

PUBLIC_PATHS = ("/health",)  # need no key


class AuthMiddleware:
    """Plain ASGI middleware, so that a client's disconnect reaches the application.

    Behind it `request.state.client` is the name of the request's API key, None where nobody is asked for one.

    Args:
        count: called with each request's status at its end.
    """

    def __init__(self, app: ASGIApp, settings: Settings, count: Callable[[int], None]):
        self._app, self._settings, self._count = app, settings, count
        self._keys = Keyring(settings.keys)

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
            client = self._check(scope)
        except ApiError as error:
            await error.response()(scope, receive, counting_send)
        else:
            try:
                state = scope.get("state", {}) | {"client": client}
                await self._app(scope | {"state": state}, self._bounded(receive), counting_send)
            except Exception:  # answered with 500 further out
                status = 500
                raise
        finally:
            self._count(status)

    def _check(self, scope: Scope) -> str | None:
        """The name of the request's key, None where nobody is asked; ApiError where the request is not let in."""
        headers = Headers(scope=scope)
        self._check_host(headers.get("host", ""))
        client = self._keys.name_of(headers.get("authorization", ""))
        if self._keys and client is None and scope["path"] not in PUBLIC_PATHS:
            raise ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            raise ApiError(413, self._too_large(), code="request_too_large", headers={"Connection": "close"})
        return client

    def _check_host(self, host: str) -> None:
        """A web page may have its own name resolved to this machine; the browser then says that name here."""
        allowed = self._settings.allowed_hosts
        if allowed and (name := _name_of(host)) not in allowed:
            raise ApiError(
                400, f"the host {name!r} is not served here; the server's --allowed_hosts names those that are",
                code="host_not_allowed",
            )  # fmt: skip

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` that counts the body, which need not say its length ahead, and the seconds until it is there."""
        loop, read, complete = asyncio.get_running_loop(), 0, False
        deadline = loop.time() + self._settings.body_timeout_s

        async def bounded() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                seconds = self._settings.body_timeout_s
                raise BodyError(408, f"the body was not there after {seconds:g} s", "request_timeout") from None
            read, complete = read + len(message.get("body", b"")), not message.get("more_body", False)
            if read > self._settings.max_body_bytes:
                raise BodyError(413, self._too_large(), "request_too_large")
            return message

        return bounded

    def _too_large(self) -> str:
        return f"the request's body is larger than the {self._settings.max_body_bytes} bytes this server takes"


def _name_of(host: str) -> str:
    """A Host header's name, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return host
