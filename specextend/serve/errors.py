"""Errors of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from specextend.errors import CapacityError, SpecExtendError

_LOG = logging.getLogger("uvicorn.error")
_TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
_CODES = {404: "unknown_url", 405: "method_not_allowed"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The form of every error."""

    error: ErrorDetail


class BodyError(HTTPException):
    """A body that is refused while it arrives, where FastAPI lets no other exception through."""

    def __init__(self, status: int, message: str, code: str):
        super().__init__(status, message, headers={"Connection": "close"})
        self.code = code


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
        message, param = (text and _sendable(text) for text in (str(self), self.param))
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

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
        code = getattr(error, "code", None) or _CODES.get(error.status_code)
        return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = None if first["type"] == "json_invalid" else _path(first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if param:
            message = f"{param}: {message}"
        elif first["type"] != "value_error":
            message = f"the body must be a JSON object, sent as application/json ({message})"
        return ApiError(400, message, param=param, code=first["type"]).response()


def _sendable(text: str) -> str:
    """What a client wrote may come back in an error, half a surrogate pair too."""
    return text.encode(errors="backslashreplace").decode()


def _path(place: Sequence[int | str]) -> str | None:
    """A field as clients write it: ("body", "messages", 0, "role") is messages[0].role."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place if part != "body")
    return path.removeprefix(".") or None
