"""Refusals of the CPU host in OpenAI's form: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import secrets

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

NO_KEY_NEEDED = "/health"  # container probes send no keys


class BadRequest(ValueError):
    """A refused request. `status`: HTTP status; `code`: OpenAI's error code; `param`: the field."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def error_reply(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error reply with one sentence. Lone surrogates, which UTF-8 cannot encode, are written as escapes."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    words = {"message": message, "type": kind, "param": param, "code": code}
    sendable = {name: text and text.encode(errors="backslashreplace").decode() for name, text in words.items()}
    return JSONResponse({"error": sendable}, status)


def add_error_handlers(app: FastAPI) -> None:
    """Give every error of `app`, FastAPI's own included, OpenAI's form."""

    @app.exception_handler(BadRequest)
    async def refuse(_request: Request, error: BadRequest) -> JSONResponse:
        return error_reply(error.status, str(error), error.code, error.param)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [(".".join(map(str, e["loc"][1:])), e["msg"]) for e in error.errors()]
        return error_reply(400, "; ".join(f"{where}: {what}" for where, what in problems), param=problems[0][0] or None)

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> JSONResponse:
        reply = error_reply(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        reply.headers.update(error.headers or {})
        return reply

    @app.exception_handler(Exception)
    async def fail(_request: Request, _error: Exception) -> JSONResponse:
        return error_reply(500, "the CPU host failed on this request: its log has the reason.")


def require_key(app: FastAPI, api_key: str) -> None:
    """Answer 401 to every request that lacks `Authorization: Bearer <api_key>`, /health and OPTIONS excepted, as SGLang does."""

    @app.middleware("http")
    async def check(request: Request, call_next):
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Starlette decodes header bytes as Latin-1; this restores the bytes that were sent.
        right = scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode("latin-1"), api_key.encode())
        if right or request.method == "OPTIONS" or request.url.path == NO_KEY_NEEDED:
            return await call_next(request)
        return error_reply(401, "the API key is missing or wrong: send Authorization: Bearer KEY.", "invalid_api_key")
