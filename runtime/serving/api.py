"""The shapes of requests and answers, as OpenAI's images API has them, with what PersonalQ adds. Checked at the door."""

import re
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .options import Limits

Json = dict[str, Any]
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


class ApiError(Exception):
    """A refusal: its HTTP status and the `error` object of the answer."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, **more: Any) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.retry_after: int | None = more.pop("retry_after", None)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "code": code, "param": param, **more}}

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's clients try 409 and 5xx again by themselves unless they are told that it will not help."""
        if self.retry_after is not None:
            return {"Retry-After": str(self.retry_after)}
        return {"x-should-retry": "false"}


class Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckinRequest(Checked):
    """`answers`: to the questions asked so far, in order."""

    request: str = Field(min_length=1)
    answers: tuple[str, ...] = Field(default=(), max_length=8)


class ImageRequest(Checked):
    """OpenAI's fields; then PersonalQ's. `model`: a checkpoint's id; left out (or 'auto'), Check-in decides."""

    prompt: str = Field(min_length=1)
    model: str = "auto"
    n: int = Field(default=1, ge=1)
    size: str | None = "auto"
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=8)
    output_format: Literal["png"] | None = None
    # Accepted and without effect here.
    quality: str | None = None
    style: str | None = None
    background: str | None = None
    moderation: str | None = None
    output_compression: int | None = None
    user: str | None = None
    # PersonalQ's own.
    seed: int | None = Field(default=None, ge=0, lt=2**53)
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=1, le=50)
    negative_prompt: str = ""
    sampler: str | None = None
    answers: tuple[str, ...] = Field(default=(), max_length=8)
    variant: Literal["best", "reference"] = "best"
    progress: bool = False


def check_limits(request: ImageRequest, limits: Limits) -> tuple[int | None, int | None]:
    """(width, height) asked for. Raises ApiError for more than the server allows."""
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        check_length(text, limits, name)
    for name, value, most in (("n", request.n, limits.images), ("steps", request.steps or 0, limits.steps)):
        if value > most:
            raise ApiError(400, "limit", f"{name}: must be at most {most} on this server, got {value}", param=name)
    if request.size in (None, "auto"):
        return None, None
    match = _SIZE.fullmatch(request.size or "")
    if match is None:
        raise ApiError(400, "size", f"size: must be 'auto' or WIDTHxHEIGHT, got {request.size!r:.40}", param="size")
    width, height = int(match[1]), int(match[2])
    if width * height > limits.pixels:
        raise ApiError(
            400, "limit", f"size: must be at most {limits.pixels} pixels, got {width * height}", param="size"
        )
    return width, height


def check_length(text: str, limits: Limits, param: str) -> None:
    """Raise ApiError for a text that is too long."""
    if len(text) > limits.prompt_chars:
        message = f"{param}: must be at most {limits.prompt_chars} characters, got {len(text)}; shorten it"
        raise ApiError(400, "limit", message, param=param)


def image_event(kind: str, b64: str, size: str, **more: Any) -> Json:
    """One event of a streamed answer, with every field that OpenAI's clients expect."""
    fixed = {"quality": "auto", "background": "opaque", "output_format": "png", "created_at": int(time.time())}
    event = {"type": f"image_generation.{kind}", "b64_json": b64, "size": size, **fixed, **more}
    if kind == "completed":
        zero = {"image_tokens": 0, "text_tokens": 0}
        event["usage"] = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0, "input_tokens_details": zero}
    return event
