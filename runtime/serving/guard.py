"""What stands before the routes: API keys, the size of a body, one log line a request, and what browsers are told.

Plain ASGI, so that streaming and disconnects pass through untouched.
"""

import contextlib
import json
import logging
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api import ApiError
from .metrics import Metrics
from .options import ServeOptions

access = logging.getLogger("personalq.access")

# Only the server's own files; pictures come from requests as data. No other site may frame the page.
_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class _TooLarge(Exception):
    """Stops the route's reading; its own answer to that is dropped for ours."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, options: ServeOptions, metrics: Metrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(scope, receive, send, self._options.limits.body_bytes)
        try:
            refusal = self._refusal(request)
            if refusal is None:
                with contextlib.suppress(_TooLarge):
                    await self._app(scope, request.receive, request.send)
                refusal = _too_large(self._options.limits.body_bytes) if request.is_too_large else None
            if refusal is not None:
                self._metrics.refused.labels(refusal.code).inc()
                await request.answer(refusal)
        finally:
            self._log(request)

    def _refusal(self, request: "_Request") -> ApiError | None:
        if request.path.startswith("/v1/") and not self._options.allows(request.key):
            return ApiError(401, "invalid_api_key", "this server needs an API key: 'Authorization: Bearer KEY'")
        length = request.header(b"content-length")
        if length and (not length.isdigit() or int(length) > self._options.limits.body_bytes):
            return _too_large(self._options.limits.body_bytes)
        return None

    def _log(self, request: "_Request") -> None:
        seconds = time.perf_counter() - request.started
        path = _route(request.scope)
        self._metrics.requests.labels(path, str(request.status)).inc()
        self._metrics.request_seconds.labels(path).observe(seconds)
        line: dict[str, Any] = {"request": request.id, "method": request.scope["method"], "path": path}
        line |= {"status": request.status, "ms": round(seconds * 1e3, 1)}
        told = dict(request.scope.get("personalq", {}))
        prompt = told.pop("prompt", "")
        access.info(json.dumps(line | told | ({"prompt": prompt} if self._options.logs_prompts and prompt else {})))


class _Request:
    """One exchange: counts what comes in, notes what goes out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, most_bytes: int) -> None:
        self.scope, self._receive, self._send, self._most = scope, receive, send, most_bytes
        self.path, self.status, self.id = scope["path"], 499, uuid.uuid4().hex[:16]  # 499: left before an answer
        self.started, self._read, self._has_begun = time.perf_counter(), 0, False
        self.is_too_large = False

    def header(self, name: bytes) -> str:
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == name), "")

    @property
    def key(self) -> str:
        return self.header(b"authorization").removeprefix("Bearer ").strip()

    async def receive(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._most and not self._has_begun:
            self.is_too_large = True
            raise _TooLarge
        return message

    async def send(self, message: Message) -> None:
        if self.is_too_large and not self._has_begun:
            return
        if message["type"] == "http.response.start":
            self._has_begun, self.status = True, message["status"]
            added = [*_HEADERS, (b"x-request-id", self.id.encode())]
            message = {**message, "headers": [*message["headers"], *added]}
        await self._send(message)

    async def answer(self, error: ApiError) -> None:
        self.is_too_large = False
        body = json.dumps(error.body).encode()
        headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _too_large(most: int) -> ApiError:
    return ApiError(413, "body_too_large", f"body: must be at most {most} bytes; shorten the request")


def _route(scope: Scope) -> str:
    """The route's own pattern, so that ids in paths neither fill the metrics nor the log."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
