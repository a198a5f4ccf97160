"""The shapes of requests and answers, as OpenAI's images API has them, with what PersonalQ adds. Checked at the door."""

import re
import time
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .drawing_process.formats import LOSSLESS, Format
from .options import Limits

Json = dict[str, Any]
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_KINDS = {429: "rate_limit_error"}
_NO_EFFECT = ("quality", "style", "background", "moderation", "complexity", "user", "safety_identifier")
_NEUTRAL = ("", "auto", "standard", "opaque")  # what these fields ask for is what is done
_OF_STREAMS = ("partial_images", "progress")


class ApiError(Exception):
    """A refusal: its HTTP status and the `error` object of the answer. headers: of the answer, besides its own."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self._headers = status, code, headers or {}
        self.retry_after: int | None = more.pop("retry_after", None)
        kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code, **more}}

    @property
    def headers(self) -> dict[str, str]:
        """OpenAI's clients try 409 and 5xx again by themselves unless they are told that it will not help."""
        if self.retry_after is not None:
            return {"Retry-After": str(self.retry_after), **self._headers}
        return {"x-should-retry": "false", **self._headers}


class Fault(BaseModel):
    """What a refusal says; further fields go with some codes (`clarify`: question, options, candidates)."""

    message: str
    type: str
    param: str | None
    code: str


class Refusal(BaseModel):
    """Every answer that is an error: OpenAI's shape. Described here, made by ApiError."""

    error: Fault


def _allow_null(schema: Json) -> None:
    """Say in the description, too, that an optional field may be null."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            told = {key: field.pop(key) for key in list(field) if key not in ("default", "title")}
            field["anyOf"] = [told, {"type": "null"}]


class Checked(BaseModel):
    """A body of a request. null means what leaving the field out means: clients send it for every field they know."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_allow_null)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, told: Any) -> Any:
        return {name: value for name, value in told.items() if value is not None} if isinstance(told, dict) else told


class CheckinRequest(Checked):
    """`answers`: to the questions asked so far, in order."""

    request: str = Field(min_length=1)
    answers: tuple[str, ...] = Field(default=(), max_length=8)


class ImageRequest(Checked):
    """OpenAI's fields; then PersonalQ's. `model`: a checkpoint's id; left out (or 'auto'), Check-in decides."""

    prompt: str = Field(min_length=1)
    model: str = "auto"
    n: int = Field(default=1, ge=1)
    size: str = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=8)
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(default=LOSSLESS, ge=0, le=100)
    # Without effect here; the answer says so.
    quality: str = "auto"
    style: str = "auto"
    background: str = "auto"
    moderation: str = "auto"
    complexity: str = "auto"
    user: str = ""
    safety_identifier: str = ""
    # PersonalQ's own.
    seed: int | None = Field(default=None, ge=0, lt=2**53)
    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=1, le=50)
    negative_prompt: str = ""
    sampler: str | None = None
    answers: tuple[str, ...] = Field(default=(), max_length=8)
    variant: Literal["best", "reference"] = "best"
    progress: bool = False

    @property
    def names_model(self) -> bool:
        """Whether the client chose the checkpoint itself."""
        return self.model not in ("", "auto")


def unused(request: ImageRequest) -> list[str]:
    """What a request says that changes nothing in its answer, a line each."""
    told = [f"{name}: has no effect here" for name in _NO_EFFECT if getattr(request, name) not in _NEUTRAL]
    if not request.stream:
        told += [f"{name}: has no effect without 'stream'" for name in _OF_STREAMS if getattr(request, name)]
    elif request.response_format == "url":
        told.append("response_format: has no effect with 'stream', whose pictures are b64_json")
    if request.answers and request.names_model:
        told.append("answers: have no effect where 'model' names the checkpoint")
    return told


def format_of(request: ImageRequest) -> Format:
    """The files that are asked for. Raises ApiError for a PNG with losses."""
    if request.output_format == "png" and request.output_compression != LOSSLESS:
        name = "output_compression"
        text = f"{name}: must be {LOSSLESS} for png, got {request.output_compression}; leave it out, or ask for jpeg or webp"
        raise ApiError(400, name, text, param=name)
    return Format(request.output_format, request.output_compression)


def check_limits(request: ImageRequest, limits: Limits) -> tuple[int | None, int | None]:
    """(width, height) asked for. Raises ApiError for more than the server allows."""
    for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt)):
        check_length(text, limits, name)
    images = min(limits.images, limits.queue)  # more than the queue holds would be refused for ever
    for name, value, most in (("n", request.n, images), ("steps", request.steps or 0, limits.steps)):
        if value > most:
            raise ApiError(400, "limit", f"{name}: must be at most {most} on this server, got {value}", param=name)
    if request.size == "auto":
        return None, None
    match = _SIZE.fullmatch(request.size)
    if match is None:
        raise ApiError(400, "size", f"size: must be 'auto' or WIDTHxHEIGHT, got {request.size!r:.40}", param="size")
    width, height = int(match[1]), int(match[2])
    if width * height > limits.pixels:
        text = f"size: must be at most {limits.pixels} pixels, got {width * height}; ask for less, or for 'auto'"
        raise ApiError(400, "limit", text, param="size")
    return width, height


def check_length(text: str, limits: Limits, param: str) -> None:
    """Raise ApiError for a text that is too long."""
    if len(text) > limits.prompt_chars:
        message = f"{param}: must be at most {limits.prompt_chars} characters, got {len(text)}; shorten it"
        raise ApiError(400, "limit", message, param=param)


def image_event(kind: str, b64: str, form: Format, size: str, **more: Any) -> Json:
    """One event of a streamed answer, with every field that OpenAI's clients expect. size: WIDTHxHEIGHT, as drawn."""
    fixed = {"quality": "auto", "background": "opaque", "output_format": form.name, "created_at": int(time.time())}
    event = {"type": f"image_generation.{kind}", "b64_json": b64, "size": size, **fixed, **more}
    if kind == "completed":
        zero = {"image_tokens": 0, "text_tokens": 0}
        event["usage"] = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0, "input_tokens_details": zero}
    return event
