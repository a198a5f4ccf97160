"""The HTTP process's end of the drawing process: jobs in, events out, and a new process when it dies.

What was being drawn when it died is answered with an error; what was waiting is given to the next one.
"""

import asyncio
import contextlib
import json
import logging
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ...engines.memory import draw_environment
from ..options import DrawOptions
from .formats import PNG
from .messages import HEAD, Message, pack, sizes

logger = logging.getLogger("personalq.runtime")
Event = tuple[Message, bytes]
_RESTART_SECONDS = (0.05, 0.5, 2.0, 5.0)  # before the next attempt; the last one for all later ones
_SETTLED_SECONDS = 30.0
_MOST_DEATHS = 3  # a waiting picture whose engine kills every process must not be given to all of them


@dataclass
class Drawing:
    """One picture that is waited for. `events` ends with done or error."""

    order: Message
    deadline: float
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    has_started: bool = False
    deaths: int = 0

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = await self.events.get()
            yield event
            if event[0]["event"] in ("done", "error"):
                return


class Draws(Protocol):
    """What draws for a server: a process of its own here, the replicas of a cluster in fleet."""

    is_ready: asyncio.Event
    restarts: int
    residency: Message

    @property
    def outstanding(self) -> int:
        """Pictures that wait or are being drawn."""

    async def start(self) -> None:
        """Start, and return when jobs are taken."""

    async def close(self) -> None:
        """End after what is being drawn."""

    def submit(self, orders: list[Message], seconds: float) -> list[Drawing]:
        """Queue the pictures of one request; their events come through the returned Drawings."""

    def cancel(self, drawing: Drawing) -> None:
        """Forget a picture: its slot is free at once."""

    def prefetch(self, checkpoints: list[str]) -> None:
        """Load these checkpoints' engines if there is room: somebody may ask for them next."""


MakeDraws = Callable[[DrawOptions, Callable[[Message], None], Callable[[], None]], Draws]
"""From options, what is called with each report of the engines in memory, and with each death of a drawing process."""


class DrawProcess:
    """Starts the drawing process and keeps one running until `close`."""

    def __init__(
        self, options: DrawOptions, on_residency: Callable[[Message], None], on_restart: Callable[[], None]
    ) -> None:
        self._options, self._on_residency, self._on_restart = options, on_residency, on_restart
        self._process: asyncio.subprocess.Process | None = None
        self._jobs: dict[str, Drawing] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._is_closing = False
        self.is_ready = asyncio.Event()
        self.restarts = 0
        self.residency: Message = {}

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def outstanding(self) -> int:
        """Pictures that wait or are being drawn."""
        return len(self._jobs)

    async def start(self) -> None:
        """Start, and return when it can take jobs."""
        self._keeper = asyncio.create_task(self._keep())
        ready = asyncio.create_task(self.is_ready.wait())
        await asyncio.wait([self._keeper, ready], return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """End the process after the batch that is being drawn."""
        self._is_closing = True
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        if self._keeper is not None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._keeper, timeout=30)

    def submit(self, orders: list[Message], seconds: float) -> list[Drawing]:
        """Queue the pictures of one request; their events come through the returned Drawings."""
        drawings = [Drawing(order, time.monotonic() + seconds) for order in orders]
        self._jobs |= {drawing.id: drawing for drawing in drawings}
        self._send_jobs(drawings)
        return drawings

    def cancel(self, drawing: Drawing) -> None:
        """Forget a picture: its slot is free at once."""
        if self._jobs.pop(drawing.id, None) is not None:
            self._send({"op": "cancel", "id": drawing.id})

    def prefetch(self, checkpoints: list[str]) -> None:
        """Load these checkpoints' engines if there is room: somebody may ask for them next."""
        self._send({"op": "prefetch", "checkpoints": checkpoints})

    def _send_jobs(self, drawings: list[Drawing]) -> None:
        now = time.monotonic()
        jobs = [{"id": one.id, **one.order, "seconds_left": one.deadline - now} for one in drawings]
        self._send({"op": "draw", "jobs": jobs})

    def _send(self, message: Message) -> None:
        stdin = None if self._process is None else self._process.stdin
        if stdin is None or stdin.is_closing() or not self.is_ready.is_set():
            return  # jobs are given to the next process when it is ready; hints are not worth keeping
        with contextlib.suppress(ConnectionError):
            stdin.write(pack(message))

    async def _keep(self) -> None:
        attempt = 0
        while not self._is_closing:
            started = time.monotonic()
            await self._run_once()
            self.is_ready.clear()
            if self._is_closing:
                return
            attempt = 0 if time.monotonic() - started > _SETTLED_SECONDS else attempt
            self._answer_lost()
            self.restarts += 1
            self._on_restart()
            await asyncio.sleep(_RESTART_SECONDS[min(attempt, len(_RESTART_SECONDS) - 1)])
            attempt += 1

    async def _run_once(self) -> None:
        """One process from its start to its end."""
        told = json.dumps({**asdict(self._options), "repository": str(self._options.repository)})
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "runtime.serving.drawing_process.worker", told),
            stdin=pipe,
            stdout=pipe,
            start_new_session=True,
            env=draw_environment(),
        )
        assert self._process.stdout is not None
        try:
            while True:
                n_text, n_blob = sizes(await self._process.stdout.readexactly(HEAD.size))
                message = json.loads(await self._process.stdout.readexactly(n_text))
                self._take(message, await self._process.stdout.readexactly(n_blob))
        except (asyncio.IncompleteReadError, ConnectionError):
            status = await self._process.wait()
            if not self._is_closing:
                logger.error("the drawing process ended with status %s; starting another", status)

    def _take(self, message: Message, blob: bytes) -> None:
        kind = message["event"]
        if kind == "ready":
            self.is_ready.set()
            self._send_jobs(list(self._jobs.values()))
        elif kind == "residency":
            self.residency = message
            self._on_residency(message)
        elif (job := self._jobs.get(message["id"])) is not None:
            job.has_started = job.has_started or kind == "started"
            if kind in ("done", "error"):
                del self._jobs[job.id]
            job.events.put_nowait((message, blob))

    def _answer_lost(self) -> None:
        """Answer what was being drawn, and what was waiting each time that several processes died."""
        text = "the drawing process ended while it drew this picture; another one was started, ask again"
        for job in list(self._jobs.values()):
            job.deaths += 1
            if job.has_started or job.deaths >= _MOST_DEATHS:
                del self._jobs[job.id]
                job.events.put_nowait(({"event": "error", "id": job.id, "kind": "worker", "message": text}, b""))


def order(checkpoint: str, picture: dict[str, Any], settings: dict[str, Any], **more: Any) -> Message:
    """What a job says besides its id. more: variant ('best' or 'reference'), previews, form (fields of Format)."""
    return {
        "checkpoint": checkpoint,
        "picture": picture,
        "settings": settings,
        "variant": "best",
        "previews": 0,
        "form": asdict(PNG),
        **more,
    }
