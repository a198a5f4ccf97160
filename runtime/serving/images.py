"""One request for pictures: Check-in, jobs, events, answers. Between the routes and the drawing process."""

import asyncio
import base64
import contextlib
import math
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from personalq.cards.card import Card
from personalq.checkin import Decision, ask
from personalq.checkin.rewrite import prompt_for
from personalq.errors import CardError, CheckinError, EngineError, PersonalQError, RepositoryError
from personalq.repository import Repository

from ..drawing.pipeline import Settings
from ..drawing.samplers import sampler_named
from ..store import open_store
from .api import ApiError, ImageRequest, Json, check_length, check_limits, format_of, image_event, unused
from .drawing_process.process import Drawing, DrawProcess, Event, MakeDraws, order
from .kept import KeptPictures
from .metrics import Metrics
from .options import ServeOptions

_PREFETCHED = 2  # most likely engines loaded while a question is open
_SHOWN_CANDIDATES = 5
_ID_CHARS = 256  # the nearest ids are looked for: a longer name would only take longer
_TOLD = ("bundle", "policy", "unet_bytes", "steps", "batch", "size")
_STATUS = {"deadline": 504, "worker": 503, "PromptError": 400, "invalid": 400, "BundleError": 500, "EngineError": 500}


@dataclass(frozen=True)
class Chosen:
    """What will be drawn: the checkpoint, its prompt, and Check-in's decision when it was asked."""

    checkpoint: str
    prompt: str
    decision: Decision | None = None


@dataclass(frozen=True)
class Made:
    """A picture that was drawn: what is said about it, its file, and what the person who asked should know."""

    told: Json
    content: bytes
    warnings: tuple[str, ...]


class Checkin:
    """Check-in over a repository, one question at a time: the index in memory is shared."""

    def __init__(self, repository: Repository) -> None:
        self._repository, self._one_at_a_time = repository, asyncio.Lock()

    async def ask(self, request: str, answers: tuple[str, ...]) -> Decision:
        """Raises CheckinError, RepositoryError or CardError."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(ask, self._repository, request, answers)


Ask = Callable[[str, tuple[str, ...]], Awaitable[Decision]]


class Service:
    """What the routes call. Holds the repository, what draws and what is counted.

    make_draws: what draws; ask_checkin: who decides. Left out, a process of this machine, and this process.
    """

    def __init__(
        self, options: ServeOptions, make_draws: MakeDraws = DrawProcess, ask_checkin: Ask | None = None
    ) -> None:
        self.options = options
        self.repository = Repository.open(options.draw.repository)
        self.store = open_store(self.repository.root, options.draw.store, options.draw.cache_mb)
        self.metrics = Metrics()
        self.drawing = make_draws(options.draw, self.metrics.observe_residency, lambda: self.metrics.restarts.inc())
        self.is_draining = False
        self._ask = ask_checkin or Checkin(self.repository).ask
        self.pictures = KeptPictures()
        self._seconds_per_picture = 1.0

    async def start(self) -> None:
        """Start drawing, and make Check-in's index ready."""
        await self.drawing.start()
        with contextlib.suppress(PersonalQError):  # an empty repository serves its page and says so when it is asked
            await self._ask("a photo", ())

    async def close(self) -> None:
        self.is_draining = True
        await self.drawing.close()

    @property
    def is_ready(self) -> bool:
        return self.drawing.is_ready.is_set() and not self.is_draining

    async def check_in(self, request: str, answers: tuple[str, ...]) -> Decision:
        """Ask Check-in; while its question is open, the likely engines are loaded. Raises ApiError."""
        check_length(request, self.options.limits, "prompt")
        for answer in answers:
            check_length(answer, self.options.limits, "answers")
        try:
            decision = await self._ask(request, answers)
        except (CheckinError, RepositoryError, CardError) as error:
            raise ApiError(400, "checkin", str(error), param="prompt") from error
        self.metrics.checkin.labels(decision.decision).inc()
        self.metrics.checkin_seconds.observe(decision.milliseconds / 1e3)
        if decision.decision == "clarify":
            self.drawing.prefetch([candidate.id for candidate in decision.candidates[:_PREFETCHED]])
        return decision

    async def choose(self, request: ImageRequest) -> Chosen:
        """The checkpoint and prompt of a request. Raises ApiError: 400, 409 with the question, 404 when nothing fits."""
        check_limits(request, self.options.limits)  # before a question: nobody answers one to be refused after it
        format_of(request)
        if request.names_model:
            card = find_card(self.repository, request.model)
            return Chosen(card.id, prompt_for(request.prompt, card))
        decision = await self.check_in(request.prompt, request.answers)
        if decision.decision == "clarify":
            told: Json = {
                "question": decision.question,
                "options": list(decision.options),
                "candidates": seen(decision),
            }
            raise ApiError(409, "clarify", decision.question or "", param="answers", **told)
        if decision.decision != "select" or decision.checkpoint is None or decision.prompt is None:
            text = "no checkpoint fits this prompt; name one as 'model', or list them at /v1/models"
            raise ApiError(404, "no_checkpoint", text, param="prompt", candidates=seen(decision))
        return Chosen(decision.checkpoint, decision.prompt, decision)

    def submit(self, request: ImageRequest, chosen: Chosen) -> list[Drawing]:
        """Queue every picture of a request. Raises ApiError: 400, 404 without a bundle, 429 when the queue is full."""
        limits = self.options.limits
        (width, height), form = check_limits(request, limits), format_of(request)
        try:
            if request.sampler is not None:
                sampler_named(request.sampler)
            self.store.find(chosen.checkpoint, self.options.draw.target)
            if request.variant == "reference":
                self.store.reference(chosen.checkpoint)
        except EngineError as error:
            is_sampler = str(error).startswith("sampler")
            raise ApiError(400 if is_sampler else 404, "sampler" if is_sampler else "no_bundle", str(error)) from error
        if self.drawing.outstanding + request.n > limits.queue:
            wait = math.ceil(self.drawing.outstanding * self._seconds_per_picture) or 1
            text = f"the queue is full ({limits.queue} pictures); try again in about {wait} s"
            raise ApiError(429, "queue_full", text, retry_after=min(wait, 60))
        settings = Settings(request.steps, request.guidance, width, height, request.sampler)
        first = secrets.randbelow(2**32) if request.seed is None else request.seed
        previews = request.partial_images if request.stream else 0
        orders = []
        for i in range(request.n):
            picture = {"prompt": chosen.prompt, "negative_prompt": request.negative_prompt, "seed": first + i}
            more = {"variant": request.variant, "previews": previews, "form": asdict(form)}
            orders.append(order(chosen.checkpoint, picture, asdict(settings), **more))
        drawings = self.drawing.submit(orders, limits.seconds)
        self.metrics.queue.set(self.drawing.outstanding)
        return drawings

    async def events(self, drawing: Drawing) -> AsyncGenerator[Event, None]:
        """A picture's events up to 'done'. Raises ApiError for its error; cancels it when the reader leaves."""
        try:
            async with asyncio.timeout(drawing.deadline - time.monotonic() + 5):
                async for message, blob in drawing:
                    if message["event"] == "error":
                        raise ApiError(_STATUS.get(message["kind"], 500), message["kind"], message["message"])
                    self._count(message, drawing)
                    yield message, blob
        except TimeoutError:
            text = "the picture was not finished before the request's deadline; ask again later"
            raise ApiError(504, "deadline", text) from None
        finally:
            self.drawing.cancel(drawing)
            self.metrics.queue.set(self.drawing.outstanding)

    def _count(self, message: Json, drawing: Drawing) -> None:
        if message["event"] == "started":
            self.metrics.wait_seconds.observe(message["waited"])
        elif message["event"] == "done":
            self.metrics.images.labels(drawing.order["checkpoint"]).inc()
            self.metrics.draw_seconds.observe(message["seconds"])
            self.metrics.batch_size.observe(message["batch"])
            each = message["seconds"] / message["batch"]
            self._seconds_per_picture += 0.2 * (each - self._seconds_per_picture)

    async def draw(self, drawings: list[Drawing], is_gone: Callable[[], Awaitable[bool]]) -> list[Made]:
        """Every picture. Raises ApiError, also when the client left."""
        tasks = [asyncio.create_task(self._finish(drawing)) for drawing in drawings]
        watch = asyncio.create_task(_until(is_gone))
        try:
            everything = asyncio.ensure_future(asyncio.gather(*tasks))
            waited: set[asyncio.Future[Any]] = {everything, watch}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not everything.done():
                everything.cancel()
                raise ApiError(499, "client_left", "the client left before its pictures were drawn")
            return list(everything.result())
        finally:
            watch.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _finish(self, drawing: Drawing) -> Made:
        told: Json = {"checkpoint": drawing.order["checkpoint"], "seed": drawing.order["picture"]["seed"]}
        async with contextlib.aclosing(self.events(drawing)) as events:
            async for message, blob in events:
                if message["event"] == "queued":
                    told |= {"engine": message["engine"], "fallback_reason": message["reason"]}
                elif message["event"] == "done":
                    told |= {name: message[name] for name in _TOLD}
                    told["seconds"] = round(message["seconds"], 4)
                    return Made(told, blob, tuple(message["warnings"]))
        raise ApiError(503, "worker", "the picture was not drawn; ask again")

    async def stream(
        self, request: ImageRequest, chosen: Chosen, drawings: list[Drawing]
    ) -> AsyncGenerator[Json, None]:
        """Events of every picture of a request, one picture after the other, as OpenAI streams them."""
        form, warnings = format_of(request), unused(request)
        for index, drawing in enumerate(drawings):
            partial, told = 0, explained(chosen)
            told |= {"index": index, "seed": drawing.order["picture"]["seed"]}
            async with contextlib.aclosing(self.events(drawing)) as events:
                async for message, blob in events:
                    if message["event"] == "queued":
                        told |= {"engine": message["engine"], "fallback_reason": message["reason"]}
                    if request.progress and message["event"] in ("queued", "started", "step"):
                        kept = {name: value for name, value in message.items() if name != "id"}
                        yield {"type": "image_generation.progress", **kept, **told}
                    if blob and message["event"] == "step":
                        shown = {"partial_image_index": partial, "index": index}
                        yield image_event("partial_image", _b64(blob), form, message["size"], **shown)
                        partial += 1
                    if message["event"] == "done":
                        told |= {name: message[name] for name in (*_TOLD, "seconds")}
                        last = {"index": index, "warnings": [*warnings, *message["warnings"]], "personalq": told}
                        yield image_event("completed", _b64(blob), form, message["size"], **last)


def find_card(repository: Repository, card_id: str) -> Card:
    """A card by its id. Raises ApiError for an unknown one, with the nearest; it says nothing of the server's folders."""
    try:
        return repository.card(card_id[:_ID_CHARS])
    except PersonalQError as error:
        text = str(error).replace(str(repository.root), "this repository")
        text = text.replace("list them with 'personalq ls'", "GET /v1/models lists them")
        raise ApiError(404, "model_not_found", text, param="model") from error


def seen(decision: Decision) -> list[Json]:
    """The first candidates of a decision, for people."""
    return [
        {"id": one.id, "probability": one.probability, "reasons": list(one.reasons)}
        for one in decision.candidates[:_SHOWN_CANDIDATES]
    ]


def explained(chosen: Chosen) -> Json:
    """What was chosen and why."""
    told: Json = {"checkpoint": chosen.checkpoint, "prompt": chosen.prompt}
    return told | ({"candidates": seen(chosen.decision)} if chosen.decision else {})


def answer(request: ImageRequest, chosen: Chosen, made: list[Made], link: Callable[[bytes], str]) -> Json:
    """The answer to a request that is not streamed. link: makes a URL of a picture, for those who ask for URLs."""
    data = []
    for one in made:
        is_url = request.response_format == "url"
        where = {"url": link(one.content)} if is_url else {"b64_json": _b64(one.content)}
        data.append({**where, "revised_prompt": chosen.prompt, "personalq": one.told})
    warnings = dict.fromkeys([*unused(request), *(line for one in made for line in one.warnings)])
    fixed = {"background": "opaque", "output_format": request.output_format, "size": made[0].told["size"]}
    told = {"warnings": list(warnings), "personalq": explained(chosen)}
    return {"created": int(time.time()), **fixed, "data": data, **told}


def _b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


async def _until(is_gone: Callable[[], Awaitable[bool]]) -> None:
    while not await is_gone():
        await asyncio.sleep(0.1)
