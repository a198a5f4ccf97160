"""The drawing process: engines in memory, a scheduler, and frames in (stdin) and out. Started by the HTTP process.

`python -m runtime.serving.drawing_process.worker OPTIONS` (JSON). It ends when its input ends, so it never outlives its server.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

from personalq.adapters import ADAPTER
from personalq.bundle import FileEntry, Manifest
from personalq.errors import PersonalQError

from ...drawing.attaching import Chosen, open_adapter
from ...drawing.pipeline import Picture, Pipeline, Settings
from ...engines.engine import Engine, open_engine
from ...engines.memory import allocated_bytes, memory_bytes
from ...engines.sessions import is_shared, shared_bytes
from ...residency import Loaded, Residency
from ...store import open_store
from ..options import MEGABYTE, DrawOptions
from .formats import Format
from .messages import Message, pack, read
from .scheduler import Job, Scheduler

GRAPH_SUFFIXES = (".onnx", ".data")
_REPORT_SECONDS = 1.0


class Worker:
    """Answers frames. key of a pipeline: '<engine>|<bundle folder>|<adapter's folder, or nothing>'."""

    def __init__(self, options: DrawOptions, out: BinaryIO) -> None:
        self._options = options
        self._store = open_store(options.repository, options.store, options.cache_mb)
        self._engines: WeakValueDictionary[tuple[str, Path], Engine] = WeakValueDictionary()
        self._out, self._frames = out, queue.SimpleQueue[bytes | None]()
        self._writer = threading.Thread(target=self._write, name="write", daemon=True)
        self._writer.start()
        self._residency: Residency[Pipeline] = Residency(
            self._load,
            self._estimate,
            round(options.budget_mb * MEGABYTE),
            is_fresh=is_unchanged,
            shared_bytes=shared_bytes,
        )
        self._scheduler = Scheduler(self._residency, self.emit, options.max_batch)
        self._reporter = threading.Thread(target=self._report, name="report", daemon=True)
        self._reporter.start()

    def emit(self, message: Message, blob: bytes = b"") -> None:
        self._frames.put(pack(message, blob))

    def handle(self, message: Message) -> None:
        """Do what a frame asks."""
        kind = message["op"]
        if kind == "draw":
            jobs = [job for job in map(self._job, message["jobs"]) if job is not None]
            self._scheduler.submit(jobs)
        elif kind == "cancel":
            self._scheduler.cancel(message["id"])
        elif kind == "prefetch":
            for checkpoint in message["checkpoints"]:
                self._prefetch(checkpoint)

    def close(self) -> None:
        self._scheduler.close()
        self._frames.put(None)
        self._writer.join(timeout=5)

    def _job(self, told: Message) -> Job | None:
        """A job that can be queued; None when it was answered with its reason."""
        try:
            key, reason = self._find(told["checkpoint"], told["variant"])
            self.emit({"event": "queued", "id": told["id"], "engine": key.partition("|")[0], "reason": reason})
            return Job(
                id=told["id"],
                key=key,
                picture=Picture(**told["picture"]),
                settings=Settings(**told["settings"]),
                deadline=time.monotonic() + told["seconds_left"],
                previews=told["previews"],
                form=Format(**told["form"]),
            )
        except Exception as error:  # the boundary: the server hears about every job
            self.emit({"event": "error", "id": told["id"], "kind": type(error).__name__, "message": str(error)})
            return None

    def _prefetch(self, checkpoint: str) -> None:
        try:
            self._residency.prefetch(self._find(checkpoint, "best")[0])
        except PersonalQError:
            return  # nothing to load ahead: the request itself will say why

    def _find(self, checkpoint: str, variant: str) -> tuple[str, str]:
        """A pipeline's key and fall-back reason. variant: 'best', or 'reference' for the unquantised bundle."""
        found = self._store.find(checkpoint, self._options.target)
        drawn = found if variant == "best" else self._store.reference(checkpoint)
        return f"{found.engine_name}|{drawn.bundle}|{drawn.adapter or ''}", found.fallback_reason

    def _load(self, key: str) -> Loaded[Pipeline]:
        """A pipeline, over an engine that others with the same base share: it closes with the last of them."""
        name, bundle, adapter = _parts(key)
        self._store.ensure(bundle, *([] if adapter is None else [adapter]))
        before = allocated_bytes() - shared_bytes()
        engine = self._engines.get((name, bundle))
        is_new = engine is None or not is_engine_unchanged(engine)
        if engine is None or is_new:
            engine = open_engine(name, bundle, self._threads)
            self._engines[name, bundle] = engine
        pipeline = Pipeline(engine, [] if adapter is None else [Chosen(open_adapter(adapter))])
        took = allocated_bytes() - shared_bytes() - before
        least = graph_bytes(engine.manifest, shared_graphs(engine.manifest)) if is_new else 0
        return Loaded(pipeline, max(took, least + adapter_bytes(adapter)))

    def _estimate(self, key: str) -> int:
        name, bundle, adapter = _parts(key)
        manifest = self._store.manifest(bundle)
        if (name, bundle) in self._engines:
            return adapter_bytes(adapter)
        open_already = [file for file in shared_graphs(manifest) if is_shared(manifest, file, self._threads)]
        return graph_bytes(manifest, open_already) + adapter_bytes(adapter)

    @property
    def _threads(self) -> int | None:
        return self._options.threads or None

    def _write(self) -> None:
        while (frame := self._frames.get()) is not None:
            try:
                self._out.write(frame)
                self._out.flush()
            except (BrokenPipeError, ValueError):
                return

    def _report(self) -> None:
        while True:
            self.emit({"event": "residency", **self.report()})
            time.sleep(_REPORT_SECONDS)

    def report(self) -> dict[str, Any]:
        """What is in memory, for metrics and the page."""
        counts = self._residency.counts
        seconds, counts.load_seconds = counts.load_seconds, []
        engines = []
        for key, resident, in_use in self._residency.snapshot():
            manifest, engine = resident.loaded.value.manifest, _parts(key)[0]
            row: dict[str, Any] = {
                "checkpoint": manifest.checkpoint.id,
                "engine": engine,
                "policy": manifest.spec.policy,
            }
            row |= {"bytes": resident.loaded.bytes, "uses": resident.uses, "in_use": in_use}
            engines.append({**row, "load_seconds": round(resident.load_seconds, 4)})
        numbers = {name: value for name, value in asdict(counts).items() if name != "load_seconds"}
        return {
            "engines": engines,
            "counts": numbers,
            "load_seconds": seconds,
            "used_bytes": self._residency.used_bytes(),
            "budget_bytes": self._residency.budget_bytes,
            "process_bytes": memory_bytes(),
        }


def _parts(key: str) -> tuple[str, Path, Path | None]:
    name, bundle, adapter = key.split("|")
    return name, Path(bundle), Path(adapter) if adapter else None


def adapter_bytes(adapter: Path | None) -> int:
    """What an adapter takes in memory: its matrices, float16 on disk and float32 in the graph's inputs."""
    file = None if adapter is None else adapter / ADAPTER
    return 2 * file.stat().st_size if file is not None and file.is_file() else 0


def graph_bytes(manifest: Manifest, without: Collection[str] = ()) -> int:
    """Bytes of a bundle's graphs and weights on disk, those of the graphs `without` left out."""
    left_out = {Path(file).stem for file in without}
    files = {name: entry for name, entry in manifest.files.items() if Path(name).stem not in left_out}
    return sum(entry.bytes for name, entry in files.items() if name.endswith(GRAPH_SUFFIXES))


def shared_graphs(manifest: Manifest) -> list[str]:
    """The graphs that ONNX Runtime opens once for all bundles with the same files."""
    graphs = manifest.graphs
    return [file for file in (graphs.text_encoder, graphs.text_encoder_2, graphs.vae_decoder) if file]


def is_unchanged(pipeline: Pipeline) -> bool:
    """Whether what a pipeline draws with is what it was opened with: its engine's files, and its adapters'."""
    adapters = [one.opened for one in pipeline.wearing.chosen if one.opened.folder is not None]
    return is_engine_unchanged(pipeline.engine) and all(
        have_sizes(one.folder, one.manifest.files) for one in adapters if one.folder is not None
    )


def is_engine_unchanged(engine: Engine) -> bool:
    """Whether the bundle's files still have the sizes they were exported with (the cheap half of the check at opening), and
    what the engine made of them is whole."""
    return have_sizes(engine.bundle, engine.manifest.files) and engine.is_whole()


def have_sizes(folder: Path, files: Mapping[str, FileEntry]) -> bool:
    """Whether every file of a manifest is there, of its size."""
    try:
        return all((folder / name).stat().st_size == entry.bytes for name, entry in files.items())
    except OSError:
        return False


def is_of_no_prompt(record: logging.LogRecord) -> bool:
    """Whether a line may go to the log: what a prompt lost is said in its answer, and prompts are not the log's."""
    return not str(record.msg).startswith("prompt:")


def main() -> None:
    """Serve frames until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the server, which drains first
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="personalq: %(message)s")
    logging.getLogger("personalq.runtime").addFilter(is_of_no_prompt)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, never between frames
    settings = json.loads(sys.argv[1])
    worker = Worker(DrawOptions(**{**settings, "repository": Path(settings["repository"])}), out)
    worker.emit({"event": "ready", "pid": os.getpid()})
    while (frame := read(sys.stdin.buffer)) is not None:
        worker.handle(frame[0])
    worker.close()


if __name__ == "__main__":
    main()
