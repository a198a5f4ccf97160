"""A run over many checkpoints: families first, then bases' engines, each once, then every checkpoint; failures collected."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from exporters.graphs.family import family_folder, is_traced
from personalq.adapters import read_any
from personalq.errors import PersonalQError
from personalq.repository import Repository
from personalq.repository.sharing import SMALLEST, link_shared

from .planning import bases_of
from .work import Outcome, Task, Work

Report = Callable[[str, float], None]


class Workers(Protocol):
    """Where tasks run."""

    def submit(self, task: Task) -> "Future[Outcome]":
        """A future of the outcome; any exception from it means that the worker was lost."""

    def close(self) -> None:
        """End all of them."""


@dataclass
class Summary:
    """What a run did. bases: their engines. families: keys that the repository did not have before. seconds: start to end."""

    outcomes: list[Outcome] = field(default_factory=list)
    bases: list[Outcome] = field(default_factory=list)
    families: list[str] = field(default_factory=list)
    seconds: float = 0.0
    bytes_shared: int = 0

    @property
    def has_failed(self) -> bool:
        """Whether a base or a checkpoint could not be made."""
        return any(one.state == "failed" for one in (*self.bases, *self.outcomes))

    def of(self, state: str) -> list[Outcome]:
        return sorted((one for one in self.outcomes if one.state == state), key=lambda one: one.id)

    def to_json(self) -> dict[str, Any]:
        rows = {state: [one.to_json() for one in self.of(state)] for state in ("done", "reused", "failed")}
        everything = [*self.bases, *self.outcomes]
        total = sum(one.bytes for one in everything)
        peak = max((one.peak_rss_bytes for one in everything), default=0)
        return {
            **rows,
            "bases": [{"state": one.state, **one.to_json()} for one in self.bases],
            "checkpoints": len(self.outcomes),
            "forms": {form: sum(one.form == form for one in self.outcomes) for form in ("attached", "merged")},
            "families_traced": self.families,
            "seconds": round(self.seconds, 2),
            "bytes": total,
            "bytes_shared": self.bytes_shared,
            "largest_peak_rss_bytes": peak,
        }


def run_fleet(work: Work, ids: Sequence[str], workers: Workers, retries: int, report: Report) -> Summary:
    """Export every id; the workers are closed at the end, also when the run is interrupted."""
    started, summary = time.perf_counter(), Summary()
    repository = Repository.open(work.root)
    try:
        families = untraced(repository, ids)
        for outcome in run_all([Task("family", one) for one in families.values()], workers, retries):
            report(f"tracing families, once each: {outcome.id} {outcome.state}", 0.0)
        summary.families = [key for key in families if is_traced(repository.root / "families" / key)]
        bases = bases_of(work, repository, ids)
        for outcome in run_all([Task("base", one) for one in bases], workers, retries):
            summary.bases.append(outcome)
            report(f"engines of bases, once each: {outcome.id} {outcome.state}", 0.0)
        for outcome in run_all([Task("checkpoint", one) for one in ids], workers, retries):
            summary.outcomes.append(outcome)
            report(progress_line(summary, len(ids), time.perf_counter() - started), len(summary.outcomes) / len(ids))
    finally:
        workers.close()
    summary.bytes_shared = share_again(repository.root, summary)
    summary.seconds = time.perf_counter() - started
    return summary


def untraced(repository: Repository, ids: Sequence[str]) -> dict[str, str]:
    """Folder name of every missing family -> one checkpoint of it. An unreadable checkpoint fails later, in its own task."""
    found: dict[str, str] = {}
    bases: set[Path] = set()
    for one in ids:
        try:
            base = repository.base_dir(repository.card(one))
            if base in bases:
                continue
            bases.add(base)
            folder = family_folder(repository.root / "families", base)
        except PersonalQError:
            continue
        if not is_traced(folder):
            found.setdefault(folder.name, one)
    return found


def run_all(tasks: Sequence[Task], workers: Workers, retries: int) -> Iterator[Outcome]:
    """Yield each task's outcome as it ends; failures that may be temporary are retried after all others."""
    ended: queue.SimpleQueue[Future[Outcome]] = queue.SimpleQueue()
    open_: dict[Future[Outcome], tuple[Task, int]] = {}

    def submit(task: Task, attempt: int) -> None:
        future = workers.submit(task)
        open_[future] = (task, attempt)
        future.add_done_callback(ended.put)

    for task in tasks:
        submit(task, 1)
    while open_:
        future = ended.get()
        task, attempt = open_.pop(future)
        outcome = replace(outcome_of(future, task), attempts=attempt)
        if outcome.state == "failed" and not outcome.is_final and attempt <= retries:
            submit(task, attempt + 1)
        else:
            yield outcome


def outcome_of(future: "Future[Outcome]", task: Task) -> Outcome:
    """What the worker answered, or that it was lost."""
    error = future.exception()
    if error is None:
        return future.result()
    line = " ".join(str(error).split())[:300]
    return Outcome(task.id, "failed", "worker", f"{type(error).__name__}: {line}", is_final=False)


def progress_line(summary: Summary, n_ids: int, seconds: float) -> str:
    """'37 of 100: 30 done, 5 reused, 2 failed; about 12 min left'."""
    ended = len(summary.outcomes)
    counts = ", ".join(f"{len(summary.of(state))} {state}" for state in ("done", "reused", "failed"))
    left = seconds / ended * (n_ids - ended)
    return f"{ended} of {n_ids}: {counts}; about {left / 60:.0f} min left"


def share_again(root: Path, summary: Summary) -> int:
    """Link equal files of bundles that were exported at the same moment. Returns the bytes that are shared on disk."""
    bundles = {root / "bundles" / one.bundle for one in (*summary.bases, *summary.outcomes) if one.state != "failed"}
    large = {b: {n: e for n, e in read_any(b).files.items() if e.bytes >= SMALLEST} for b in sorted(bundles)}
    copies: dict[str, set[int]] = {}
    for bundle, files in large.items():
        for name, entry in files.items():
            copies.setdefault(entry.sha256, set()).add((bundle / name).stat().st_ino)
    for bundle, files in large.items():
        apart = {name: entry.sha256 for name, entry in files.items() if len(copies[entry.sha256]) > 1}
        link_shared(root, bundle, apart)
    everything = [((b / name).stat().st_ino, e.bytes) for b, files in large.items() for name, e in files.items()]
    return sum(size for _, size in everything) - sum(dict(everything).values())
