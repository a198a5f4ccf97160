"""The HTTP routes. Everything they do is in images.Service; what guards them is in guard."""

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from .api import ApiError, CheckinRequest, ImageRequest, Json
from .catalogue import model_row, models, sheet
from .guard import Guard
from .images import Service, answer
from .options import ServeOptions

PAGE = Path(__file__).parent / "page"
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"}
_TYPES |= {".js": "text/javascript; charset=utf-8"}


def create_app(options: ServeOptions, service: Service | None = None) -> FastAPI:
    """The application; its service starts and ends with it (`app.state.service`). service: one that draws elsewhere."""
    service = service or Service(options)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    # FastAPI's own documentation page loads scripts from a CDN; ours is /docs of the page folder.
    app = FastAPI(title="PersonalQ", version="0.1.0", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Guard, options=options, metrics=service.metrics)
    app.add_exception_handler(ApiError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_shape)
    _add_drawing(app, service)
    _add_knowledge(app, service)
    _add_operations(app, service)
    _add_page(app)
    return app


def _add_drawing(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/generations", summary="Draw pictures; Check-in picks the checkpoint when none is named")
    async def generate(asked: ImageRequest, request: Request) -> Response:
        chosen = await service.choose(asked)
        drawings = service.submit(asked, chosen)
        request.scope["personalq"] = {"checkpoint": chosen.checkpoint, "n": asked.n, "prompt": asked.prompt}
        if asked.stream:
            return StreamingResponse(_events(service, asked, chosen, drawings), media_type="text/event-stream")
        made = await service.draw(drawings, request.is_disconnected)
        base = str(request.base_url).rstrip("/")
        wants_url = asked.response_format == "url"
        return JSONResponse(
            answer(chosen, made, (lambda png: f"{base}/v1/images/{service.keep(png)}") if wants_url else None)
        )

    @app.get("/v1/images/{name}", summary="A picture that was answered as a URL")
    async def kept(name: str) -> Response:
        return Response(service.kept(name), media_type="image/png", headers={"Cache-Control": "private, max-age=600"})


async def _events(
    service: Service, asked: ImageRequest, chosen: Any, drawings: list[Any]
) -> AsyncGenerator[bytes, None]:
    """Server-sent events; an error after the first byte is an event too."""
    try:
        async with contextlib.aclosing(service.stream(asked, chosen, drawings)) as events:
            async for event in events:
                yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
    except ApiError as error:
        yield f"event: error\ndata: {json.dumps(error.body)}\n\n".encode()
    finally:
        for drawing in drawings:
            service.drawing.cancel(drawing)


def _add_knowledge(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", summary="Every checkpoint")
    async def list_models() -> Json:
        return {"object": "list", "data": models(service)}

    @app.get("/v1/models/{model:path}/sheet", summary="A checkpoint's example picture, when it came with one")
    async def model_sheet(model: str) -> Response:
        return FileResponse(sheet(service, model))

    @app.get("/v1/models/{model:path}", summary="One checkpoint")
    async def one_model(model: str) -> Json:
        return model_row(service, model)

    @app.post("/v1/checkin", summary="Which checkpoint a request means; the question when it is open")
    async def checkin(asked: CheckinRequest) -> Json:
        return (await service.check_in(asked.request, asked.answers)).to_json()


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/metrics", summary="Counters, as Prometheus reads them")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/healthz", summary="The server runs")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("ok\n")

    @app.get("/readyz", summary="Requests are taken")
    async def readyz() -> PlainTextResponse:
        is_ready = service.is_ready
        return PlainTextResponse("ready\n" if is_ready else "not ready\n", status_code=200 if is_ready else 503)

    @app.get("/v1/residency", summary="Which engines are in memory")
    async def residency() -> Json:
        report = {
            name: value for name, value in service.drawing.residency.items() if name not in ("event", "load_seconds")
        }
        return {**report, "queue": service.drawing.outstanding, "restarts": service.drawing.restarts}


def _add_page(app: FastAPI) -> None:
    files = {file.name: file for file in PAGE.iterdir() if file.suffix in _TYPES}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", media_type=_TYPES[".html"])

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(PAGE / "docs.html", media_type=_TYPES[".html"])

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in files:
            raise ApiError(404, "not_found", f"{name[:80]!r}: no such part of the page")
        return FileResponse(files[name], media_type=_TYPES[files[name].suffix])


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    service: Service = request.app.state.service
    service.metrics.refused.labels(error.code).inc()
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _refuse_shape(request: Request, error: Exception) -> Response:
    """A body of another shape: the first thing that is wrong with it, without repeating what was sent."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    return await _refuse(request, ApiError(400, "invalid_request", f"{field}: {first['msg']}", param=field))
