"""Decides what is drawn next: one batch at a time, of requests that share engine and settings, loads overlapping.

It knows jobs and a residency of pipelines, not HTTP. Lives in the drawing process.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from personalq.errors import EngineError, PersonalQError

from ...drawing.image import Image
from ...drawing.pipeline import Picture, Pipeline, Settings, Step
from ...residency import Residency
from .formats import PNG, Format, encode
from .messages import Message

Emit = Callable[[Message, bytes], None]


@dataclass(frozen=True)
class Job:
    """One picture that was asked for. key: its engine; deadline: time.monotonic(); previews: how many to show; form: of files."""

    id: str
    key: str
    picture: Picture
    settings: Settings
    deadline: float
    previews: int = 0
    form: Format = PNG


@dataclass
class _Waiting:
    job: Job
    engine: "Future[Pipeline]"
    queued: float


class Scheduler:
    """A queue and the thread that draws from it. Every event goes to `emit`: started, step, done or error, with the job's id."""

    def __init__(self, residency: Residency[Pipeline], emit: Emit, max_batch: int = 4) -> None:
        self._residency, self._emit, self._max_batch = residency, emit, max_batch
        self._changed = threading.Condition()
        self._queue: list[_Waiting] = []
        self._cancelled: set[str] = set()
        self._drawing: frozenset[str] = frozenset()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="draw", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, together so that they can share a batch; their engines begin to load now, while others are drawn."""
        waiting = [_Waiting(job, self._residency.pin(job.key), time.monotonic()) for job in jobs]
        with self._changed:
            self._queue += waiting
            self._changed.notify()
        for one in waiting:
            one.engine.add_done_callback(lambda _: self._wake())

    def cancel(self, job_id: str) -> None:
        """Forget a job: at once while it waits, before the next step when it is being drawn."""
        with self._changed:
            for waiting in [one for one in self._queue if one.job.id == job_id]:
                self._leave(waiting)
            if job_id in self._drawing:
                self._cancelled.add(job_id)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the batch that is being drawn."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _leave(self, waiting: _Waiting) -> None:
        self._queue.remove(waiting)
        self._residency.unpin(waiting.job.key)

    def _run(self) -> None:
        while True:
            with self._changed:
                batch = self._take()
                while not batch and self._is_open:
                    self._changed.wait(timeout=self._next_deadline())
                    batch = self._take()
                if not self._is_open:
                    return
                self._drawing = frozenset(waiting.job.id for waiting in batch)
            try:
                self._draw(batch)
            finally:
                with self._changed:
                    self._drawing = frozenset()
                    self._cancelled.clear()
                for waiting in batch:
                    self._residency.unpin(waiting.job.key)

    def _next_deadline(self) -> float | None:
        deadlines = [waiting.job.deadline for waiting in self._queue]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _take(self) -> list[_Waiting]:
        """The oldest job whose engine is loaded, and those that can share its batch; failed and late ones are answered."""
        now = time.monotonic()
        for waiting in list(self._queue):
            error = waiting.engine.exception() if waiting.engine.done() else None
            if error is not None:
                self._leave(waiting)
                self._fail(waiting.job, error)
            elif waiting.job.deadline <= now:
                self._leave(waiting)
                self._emit_late(waiting.job)
        first = next((waiting for waiting in self._queue if waiting.engine.done()), None)
        if first is None:
            return []
        same = [w for w in self._queue if w.job.key == first.job.key and w.job.settings == first.job.settings]
        batch = same[: self._max_batch]
        self._queue = [waiting for waiting in self._queue if waiting not in batch]
        return batch

    def _draw(self, batch: Sequence[_Waiting]) -> None:
        """Draw a batch and answer every job of it; one whose prompt is refused leaves the others alone."""
        pipeline = batch[0].engine.result()
        jobs = []
        for waiting in batch:
            try:
                pipeline.rows(waiting.job.picture.prompt)
                pipeline.rows(waiting.job.picture.negative_prompt)
                jobs.append(waiting.job)
            except Exception as error:
                self._fail(waiting.job, error)
        for waiting in batch:
            self._emit({"event": "started", "id": waiting.job.id, "waited": time.monotonic() - waiting.queued}, b"")
        try:
            if jobs:
                self._denoise(pipeline, jobs)
        except Exception as error:  # the boundary: whatever happened, every job gets an answer
            for job in jobs:
                self._fail(job, error)

    def _denoise(self, pipeline: Pipeline, jobs: list[Job]) -> None:
        begun = time.monotonic()
        try:
            steps = pipeline.denoise([job.picture for job in jobs], jobs[0].settings)
        except EngineError as error:  # before the first step: what was asked for does not fit this checkpoint
            for job in jobs:
                self._emit({"event": "error", "id": job.id, "kind": "invalid", "message": str(error)}, b"")
            return
        live = dict(enumerate(jobs))
        last: Step | None = None
        for step in steps:
            last = step
            live = {i: job for i, job in live.items() if not self._is_over(job)}
            if not live:
                return
            for i, job in live.items():
                progress: Message = {"event": "step", "id": job.id, "step": step.index + 1, "steps": step.n_steps}
                preview = pipeline.decode(step.predicted[i]) if _shows(job, step) else None
                self._emit_picture(progress, job, preview)
        assert last is not None
        seconds = time.monotonic() - begun
        for i, job in live.items():
            told: Message = {
                "event": "done",
                "id": job.id,
                "seconds": seconds,
                "batch": len(jobs),
                "steps": last.n_steps,
            }
            manifest = pipeline.manifest
            told |= {
                "bundle": manifest.key,
                "policy": " ".join(dict.fromkeys((manifest.spec.policy, manifest.spec.bits))),
            }
            told |= {"unet_bytes": manifest.sizes.unet, "warnings": pipeline.warnings(job.picture)}
            self._emit_picture(told, job, pipeline.decode(last.latents[i]))

    def _emit_picture(self, told: Message, job: Job, image: Image | None) -> None:
        """Emit an event with its picture, when it has one, as the file that the job asks for."""
        if image is None:
            self._emit(told, b"")
            return
        height, width, _ = image.shape
        self._emit({**told, "size": f"{width}x{height}"}, encode(image, job.form))

    def _is_over(self, job: Job) -> bool:
        if job.id in self._cancelled:
            return True
        if job.deadline <= time.monotonic():
            self._emit_late(job)
            return True
        return False

    def _emit_late(self, job: Job) -> None:
        text = "the picture was not finished before the request's deadline; ask for fewer steps, or again later"
        self._emit({"event": "error", "id": job.id, "kind": "deadline", "message": text}, b"")

    def _fail(self, job: Job, error: BaseException) -> None:
        known = isinstance(error, PersonalQError)
        text = str(error) if known else f"drawing failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._emit(
            {"event": "error", "id": job.id, "kind": type(error).__name__ if known else "Bug", "message": text}, b""
        )


def _shows(job: Job, step: Step) -> bool:
    """Whether a preview follows this step: `previews` of them, evenly spread, none after the last step."""
    if not job.previews or step.index == step.n_steps - 1:
        return False
    every = step.n_steps / (job.previews + 1)
    return int((step.index + 1) / every) > int(step.index / every)
