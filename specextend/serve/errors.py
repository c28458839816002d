"""Errors of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from specextend.errors import CapacityError, SpecExtendError

_LOG = logging.getLogger("uvicorn.error")
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """An error response.

    Args:
        code: a word for programs.
        param: the request's field it is about.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers

    @property
    def body(self) -> dict:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, dict(self.headers or {}))

    @classmethod
    def of(cls, error: Exception) -> ApiError:
        """400 with its message for a client's mistake; for anything else 500, with the details in the log only."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, SpecExtendError):
            code = "context_length_exceeded" if isinstance(error, CapacityError) else "invalid_value"
            return cls(400, str(error), code=code)
        _LOG.error("a request failed", exc_info=error)
        return cls(500, "the server failed to answer; its log says why", code="internal_error")


def register(app: FastAPI) -> None:
    """Every error of `app` becomes an OpenAI error."""

    @app.exception_handler(ApiError)
    @app.exception_handler(SpecExtendError)
    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return ApiError.of(error).response()

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body" and not isinstance(part, int)]
        message = first["msg"].removeprefix("Value error, ")
        param = where[0] if where and first["type"] != "json_invalid" else None
        if param:
            message = f"{param}: {message}"
        elif first["type"] != "value_error":
            message = f"the body must be a JSON object, sent as application/json ({message})"
        return ApiError(400, message, param=param, code=first["type"]).response()
