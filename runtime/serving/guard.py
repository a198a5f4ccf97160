"""What stands before the routes: API keys, the size of a body, one log line a request, and what browsers are told.

Plain ASGI, so that streaming and disconnects pass through untouched. It also makes one path of the many spellings of one,
answers HEAD as GET without a body, and turns a bug into an answer.
"""

import asyncio
import contextlib
import json
import logging
import re
import time
import uuid
from typing import Any

from fastapi.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api import ApiError
from .metrics import Metrics
from .options import ServeOptions
from .refusals import internal_error

access = logging.getLogger("personalq.access")
PICTURES = "/v1/images/files/"
"""Where pictures that were answered as URLs are: an <img> has no key to show, and their names cannot be guessed."""

# Only the server's own files; pictures come from requests as data. No other site may frame the page.
_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
_SLASHES = re.compile("/{2,}")
_DRAIN_BYTES, _DRAIN_SECONDS = 32 << 20, 10.0


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
            refusal = self._key_refusal(request) or await self._ask_app(request)
            if refusal is not None:
                self._metrics.refused.labels(refusal.code).inc()
                await request.answer(refusal)
        finally:
            self._log(request)

    def _key_refusal(self, request: "_Request") -> ApiError | None:
        if not request.needs_key or any(map(self._options.allows, request.keys)):
            return None
        got = "one that is not known" if any(request.keys) else "none"
        text = f"this server needs an API key, got {got}: 'Authorization: Bearer KEY', or 'api-key: KEY'"
        return ApiError(401, "invalid_api_key", text, headers={"WWW-Authenticate": "Bearer"})

    async def _ask_app(self, request: "_Request") -> ApiError | None:
        """Let the routes answer; the refusal that is left to give when they failed."""
        try:
            await self._app(request.scope, request.receive, request.send)
        except Exception as error:  # the boundary: whatever happened, the client gets an answer
            refusal = internal_error(error, request.id)
            if request.has_begun:
                raise
            return refusal
        return None

    def _log(self, request: "_Request") -> None:
        seconds = time.perf_counter() - request.started
        path = _route(request.scope)
        self._metrics.requests.labels(path, str(request.status)).inc()
        self._metrics.request_seconds.labels(path).observe(seconds)
        line: dict[str, Any] = {"request": request.id, "method": request.method, "path": path}
        line |= {"status": request.status, "ms": round(seconds * 1e3, 1)}
        told = dict(request.scope.get("personalq", {}))
        prompt = told.pop("prompt", "")
        access.info(json.dumps(line | told | ({"prompt": prompt} if self._options.logs_prompts and prompt else {})))


class _Request:
    """One exchange: counts what comes in, notes what goes out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, most_bytes: int) -> None:
        self._receive, self._send, self._most = receive, send, most_bytes
        self.method, self.status, self.id = scope["method"], 499, uuid.uuid4().hex[:16]  # 499: left before an answer
        told = {"path": plain_path(scope["path"]), "request_id": self.id}
        self.scope = {**scope, **told, "method": "GET" if self.method == "HEAD" else self.method}
        self.started, self._read, self.has_begun = time.perf_counter(), 0, False
        length = self.header(b"content-length")
        self._declared = int(length) if length.isascii() and length.isdecimal() else 0
        self._is_read = not (self._declared or self.header(b"transfer-encoding"))

    def header(self, name: bytes) -> str:
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == name), "")

    @property
    def needs_key(self) -> bool:
        path = self.scope["path"]
        is_picture = path.startswith(PICTURES) and self.scope["method"] == "GET"
        return path.startswith("/v1/") and not is_picture

    @property
    def keys(self) -> list[str]:
        """The keys a request shows, '' for none: as OpenAI's client does, and as its AzureOpenAI does."""
        words = self.header(b"authorization").split(maxsplit=1)
        bearer = words[-1].strip() if words and (len(words) == 1 or words[0].lower() == "bearer") else ""
        return [bearer, self.header(b"api-key").strip()]

    async def receive(self) -> Message:
        """The next part of the body. Raises HTTPException, which the framework passes on, when it is or will be too large."""
        if self._declared <= self._most or self.has_begun:
            message = await self._receive()
            self._note(message)
            if self._read <= self._most or self.has_begun:
                return message
        raise HTTPException(413, f"body: must be at most {self._most} bytes; shorten the request")

    def _note(self, message: Message) -> None:
        self._read += len(message.get("body", b""))
        self._is_read = self._is_read or not message.get("more_body", False)

    async def _drain(self) -> None:
        """Read what is left of a body before the answer: a client that still sends gets a reset, and never reads it."""
        if self._is_read or self.header(b"expect"):  # whoever expects a word before the body has not sent it
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self._is_read and self._read < _DRAIN_BYTES:
                    self._note(await self._receive())

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._drain()
            self.has_begun, self.status = True, message["status"]
            added = [*_HEADERS, (b"x-request-id", self.id.encode())]
            message = {**message, "headers": [*message["headers"], *added]}
        elif self.method == "HEAD":
            message = {**message, "body": b""}
        await self._send(message)

    async def answer(self, error: ApiError) -> None:
        body = json.dumps(error.body).encode()
        headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def plain_path(path: str) -> str:
    """A path without doubled slashes and without one at its end: what clients make of a base URL that ends in one."""
    return _SLASHES.sub("/", path).rstrip("/") or "/"


def _route(scope: Scope) -> str:
    """The route's own pattern, so that ids in paths neither fill the metrics nor the log."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
