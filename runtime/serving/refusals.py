"""Every answer that is an error, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

import logging
import traceback
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from .api import ApiError

logger = logging.getLogger("personalq.runtime")
_SHOWN = 80  # characters of what a client sent
_JSON = {type(None): "nothing", list: "an array", str: "a string", bool: "true or false"}
_CODES = {413: "body_too_large"}


def add_refusals(app: FastAPI) -> None:
    """Answer what the routes raise, and what the framework raises before it gets to them."""
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_shape)
    app.add_exception_handler(HTTPException, _refuse_route)


def internal_error(error: BaseException, request_id: str) -> ApiError:
    """The refusal for a bug. The log has the place; the exception's own words may hold what was sent, and are left out."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed: %s\n%s", request_id, type(error).__name__, where)
    text = f"the server failed at this request; its log has the reason under {request_id}"
    return ApiError(500, "internal_error", text)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.app.state.service.metrics.refused.labels(error.code).inc()
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, no such method, a body that cannot be read."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"[:_SHOWN]
    if error.status_code == 404:
        refusal = ApiError(404, "unknown_url", f"{asked}: no such route; OpenAI's are under /v1, /docs lists all")
    elif error.status_code == 405:
        methods = error.headers["Allow"] if error.headers else ""
        allowed = ", ".join(f"{one}, HEAD" if one == "GET" else one for one in methods.split(", "))
        text = f"{asked}: this route takes {allowed}"
        refusal = ApiError(405, "method_not_supported", text, headers={"Allow": allowed})
    elif error.status_code == 400:
        refusal = ApiError(400, "invalid_json", "body: must be JSON in UTF-8 that can be read; correct it")
    else:
        refusal = ApiError(error.status_code, _CODES.get(error.status_code, "refused"), str(error.detail))
    return await _refuse(request, refusal)


async def _refuse_shape(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _refuse(request, shape_refusal(error, request.headers.get("content-type", "")))


def shape_refusal(error: RequestValidationError, content_type: str) -> ApiError:
    """The first thing that is wrong with a body, without repeating the values that were sent."""
    first: dict[str, Any] = error.errors()[0]
    kind, place = first["type"], first["loc"][1:]
    if isinstance(error.body, bytes):  # left as it came: a page elsewhere can send such a body without a preflight
        got = repr(content_type[:_SHOWN]) if content_type else "none"
        text = f"content-type: must be application/json, got {got}; say so in the header"
        return ApiError(415, "unsupported_media_type", text)
    if kind == "json_invalid":
        text = f"body: must be JSON, got {first['ctx']['error']} at character {place[0]}; correct it"
        return ApiError(400, "invalid_json", text)
    if not place:
        text = f"body: must be a JSON object, got {_JSON.get(type(error.body), 'a number')}; /docs has its fields"
        return ApiError(400, "invalid_request", text)
    field = ".".join(map(str, place))[:_SHOWN]
    if kind == "extra_forbidden":
        text = f"{field}: must be a field of this request, got a name that is not; leave it out, /docs lists the fields"
        return ApiError(400, "unknown_parameter", text, param=field)
    if kind == "missing":
        return ApiError(400, "missing_required_parameter", f"{field}: must be given; add it", param=field)
    return ApiError(400, "invalid_request", f"{field}: {first['msg']}", param=field)
