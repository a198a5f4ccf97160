"""The HTTP routes. Everything they do is in images.Service; what guards them is in guard."""

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from .api import ApiError, CheckinRequest, ImageRequest, Json, Refusal
from .catalogue import model_row, models, sheet
from .cors import Cors
from .drawing_process.process import Drawing
from .guard import PICTURES, Guard
from .images import Chosen, Service, answer
from .options import ServeOptions
from .refusals import add_refusals, internal_error

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
    # A slash at a path's end is taken off by the guard: a redirect would lose the scheme behind a proxy.
    told: dict[str, Any] = {"title": "PersonalQ", "version": "0.1.0", "docs_url": None, "redoc_url": None}
    told["responses"] = {"default": {"model": Refusal, "description": "A refusal, in the shape of OpenAI's"}}
    app = FastAPI(**told, lifespan=lifespan, redirect_slashes=False)
    app.state.service = service
    app.add_middleware(Guard, options=options, metrics=service.metrics)
    if options.origins:
        app.add_middleware(Cors, origins=options.origins)  # outside the guard: pages may read its refusals, too
    add_refusals(app)
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
            events = _events(service, asked, chosen, drawings, request.scope["request_id"])
            return StreamingResponse(events, media_type="text/event-stream")
        made = await service.draw(drawings, request.is_disconnected)
        place = str(request.base_url).rstrip("/") + PICTURES

        def link(content: bytes) -> str:
            return place + service.pictures.keep(content, asked.output_format)

        return JSONResponse(answer(asked, chosen, made, link))

    @app.get(f"{PICTURES}{{name}}", summary="A picture that was answered as a URL; needs no key")
    async def kept(name: str) -> Response:
        picture, seconds = service.pictures.get(name)
        headers = {"Cache-Control": f"private, max-age={seconds}", "Cross-Origin-Resource-Policy": "cross-origin"}
        return Response(picture.content, media_type=picture.media_type, headers=headers)

    @app.post("/v1/images/edits", include_in_schema=False)
    @app.post("/v1/images/variations", include_in_schema=False)
    async def refused() -> Response:
        text = "pictures are drawn from words only: edits and variations are not supported; use /v1/images/generations"
        raise ApiError(400, "not_supported", text)


async def _events(
    service: Service, asked: ImageRequest, chosen: Chosen, drawings: list[Drawing], request_id: str
) -> AsyncGenerator[bytes, None]:
    """Server-sent events; an error after the first byte is an event too."""
    try:
        async with contextlib.aclosing(service.stream(asked, chosen, drawings)) as events:
            async for event in events:
                yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
    except Exception as error:
        refusal = error if isinstance(error, ApiError) else internal_error(error, request_id)
        yield f"event: error\ndata: {json.dumps(refusal.body)}\n\n".encode()
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
