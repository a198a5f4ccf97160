"""A server's pictures drawn by the replicas of a cluster: the counterpart of DrawProcess, behind a Ray Serve handle."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ray.exceptions import RayActorError

from runtime.serving.drawing_process.messages import Message
from runtime.serving.drawing_process.process import Drawing
from runtime.serving.options import DrawOptions

_MOST_DEATHS = 3  # a waiting picture whose engine crashes every replica must not reach all of them
_REPORT_SECONDS = 1.0
REPORTS: dict[str, Message] = {}
"""Replica -> its last report of engines in memory, as the router of this process heard it."""


class ClusterDrawing:
    """The pictures of one request go to one replica, in one call whose stream of events ends when all are answered.

    handle: of the deployment that draws. reports: replica -> its last report of what it holds.
    """

    def __init__(
        self,
        handle: Any,
        reports: Mapping[str, Message],
        options: DrawOptions,
        on_residency: Callable[[Message], None],
        on_restart: Callable[[], None],
    ) -> None:
        self._handle, self._reports = handle, reports
        self._on_residency, self._on_restart = on_residency, on_restart
        self._open: dict[str, asyncio.Task[None]] = {}
        self._background: set[asyncio.Future[Any]] = set()
        self._counted: dict[str, Message] = {}
        self.is_ready = asyncio.Event()
        self.restarts = 0
        self.residency: Message = {}

    @property
    def outstanding(self) -> int:
        """Pictures that wait or are being drawn."""
        return len(self._open)

    async def start(self) -> None:
        """Start listening to reports; Ray starts the replicas, and requests wait for them."""
        self._keep(asyncio.ensure_future(self._listen()))
        self.is_ready.set()

    async def close(self) -> None:
        for task in [*self._open.values(), *self._background]:
            task.cancel()

    def submit(self, orders: list[Message], seconds: float) -> list[Drawing]:
        """Send the pictures of one request, all of one checkpoint, to a replica."""
        drawings = [Drawing(order, time.monotonic() + seconds) for order in orders]
        task = asyncio.ensure_future(self._follow(drawings))
        self._open |= {drawing.id: task for drawing in drawings}
        self._keep(task)
        return drawings

    def cancel(self, drawing: Drawing) -> None:
        """Forget a picture; the replica stops when none of the request's pictures is wanted any more."""
        task = self._open.pop(drawing.id, None)
        if task is not None and task not in self._open.values():
            task.cancel()

    def prefetch(self, checkpoints: list[str]) -> None:
        """Load these checkpoints' engines where they would be drawn."""
        for checkpoint in checkpoints:
            self._keep(asyncio.ensure_future(self._hint(checkpoint)))

    def _keep(self, future: "asyncio.Future[Any]") -> None:
        self._background.add(future)  # asyncio itself only keeps weak references
        future.add_done_callback(self._background.discard)

    async def _hint(self, checkpoint: str) -> None:
        with contextlib.suppress(RayActorError):
            await self._handle.options(multiplexed_model_id=checkpoint).prefetch.remote([checkpoint])

    async def _follow(self, drawings: list[Drawing]) -> None:
        """Forward the replica's events until every picture is answered; what a lost replica had not begun goes to another."""
        waiting = drawings
        while waiting := [one for one in waiting if one.id in self._open]:
            try:
                await self._call(waiting)
            except RayActorError:
                self._lose(waiting)
            except Exception as error:  # the boundary: every picture gets an answer
                for one in waiting:
                    self._answer(one, "Bug", f"drawing failed: {type(error).__name__}: {str(error)[:300]}")

    async def _call(self, drawings: list[Drawing]) -> None:
        left = min(one.deadline for one in drawings) - time.monotonic()
        handle = self._handle.options(multiplexed_model_id=drawings[0].order["checkpoint"], stream=True)
        events = handle.draw.remote([one.order for one in drawings], left)
        try:
            async for place, message, blob in events:
                self._take(drawings[place], message, blob)
        except asyncio.CancelledError:
            events.cancel()
            raise

    def _take(self, drawing: Drawing, message: Message, blob: bytes) -> None:
        drawing.has_started = drawing.has_started or message["event"] == "started"
        if message["event"] in ("done", "error"):
            self._open.pop(drawing.id, None)
        drawing.events.put_nowait((message, blob))

    def _lose(self, drawings: list[Drawing]) -> None:
        self.restarts += 1
        self._on_restart()
        for one in drawings:
            one.deaths += 1
            if one.has_started or one.deaths >= _MOST_DEATHS:
                self._answer(one, "worker", "the replica that drew this picture was lost; ask again")

    def _answer(self, drawing: Drawing, kind: str, text: str) -> None:
        if drawing.id in self._open:
            self._take(drawing, {"event": "error", "id": drawing.id, "kind": kind, "message": text}, b"")

    async def _listen(self) -> None:
        while True:
            reports = dict(self._reports)
            self._counted |= {replica: report["counts"] for replica, report in reports.items()}
            self.residency = merged(reports, self._counted)
            self._on_residency(self.residency)
            await asyncio.sleep(_REPORT_SECONDS)


def merged(reports: Mapping[str, Message], counted: Mapping[str, Message]) -> Message:
    """One report of all replicas, with the counts of those that are gone, too."""
    counts: Counter[str] = Counter({"hits": 0, "misses": 0, "evictions": 0, "failures": 0, "prefetched": 0})
    for each in counted.values():
        counts.update(each)
    engines = [{**row, "replica": replica} for replica, report in reports.items() for row in report["engines"]]
    sums = {
        name: sum(report[name] for report in reports.values())
        for name in ("used_bytes", "budget_bytes", "process_bytes")
    }
    return {"engines": engines, "counts": dict(counts), "load_seconds": [], **sums}
