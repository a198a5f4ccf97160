"""One checkpoint or base, wherever it runs: calibrate unless it has a current spec, export, build, verify; or attach.

Every step is content-addressed or checks for existing results first, so a task may be repeated, also after a kill.
"""

import logging
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from exporters.adapters import export_adapter
from exporters.export import ExportResult
from exporters.graphs.family import open_family
from exporters.plain import STORAGES
from exporters.request import base_request, export_request, is_current, last_spec, reference_spec
from personalq.adapters import read_any
from personalq.cards.card import folder_name
from personalq.errors import PersonalQError, SpecError
from personalq.repository import Repository
from personalq.repository.remote import Remote

from .planning import form_for
from .verified import is_verified, verified_level, verify, verify_attached
from .work import DEFAULT_SPEC, NOT_VERIFIED, Outcome, Task, Work

logger = logging.getLogger("personalq.fleet")

Export = Callable[..., ExportResult]


@dataclass
class Steps:
    """Where a task is, and the seconds of each step so far."""

    name: str = "start"
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.name, started = name, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def run_task(work: Work, task: Task) -> Outcome:
    """Do one task. Never raises: what went wrong is the outcome, with the step and one line."""
    steps = Steps()
    try:
        made = _KINDS[task.kind](work, task.id, steps)
    except PersonalQError as error:
        is_final = not isinstance(error.__cause__, OSError)  # a full disk or a lost mount may be back the next time
        return Outcome(task.id, "failed", steps.name, _line(error), is_final, seconds=steps.seconds)
    except Exception as error:  # the boundary: one checkpoint never stops the others
        logger.exception("%s: %s", task.id, steps.name)
        reason = f"{type(error).__name__}: {_line(error)}"
        return Outcome(task.id, "failed", steps.name, reason, is_final=False, seconds=steps.seconds)
    return made


def _trace(work: Work, checkpoint_id: str, steps: Steps) -> Outcome:
    repository = Repository.open(work.root)
    with steps.step("trace"):
        open_family(repository.root / "families", repository.base_dir(repository.card(checkpoint_id)))
    return Outcome(checkpoint_id, "done", seconds=steps.seconds)


def _checkpoint(work: Work, checkpoint_id: str, steps: Steps) -> Outcome:
    with steps.step("look up"):
        repository = Repository.open(work.root)
        repository.checkpoint_dir(checkpoint_id)
        form = form_for(work, repository, checkpoint_id)
    export = _attached if form.name == "attached" else _merged
    return replace(export(work, repository, checkpoint_id, steps), form=form.name, form_reason=form.reason)


def _base(work: Work, base_id: str, steps: Steps) -> Outcome:
    """A base's engine. It has no picture of its own to be held to beyond its goldens, and is gated as a checkpoint's."""
    return replace(_engine(work, Repository.open(work.root), base_id, steps, base_request), form="base")


def _merged(work: Work, repository: Repository, checkpoint_id: str, steps: Steps) -> Outcome:
    return _engine(work, repository, checkpoint_id, steps, export_request)


def _engine(work: Work, repository: Repository, id_: str, steps: Steps, export: Export) -> Outcome:
    """An engine of a checkpoint or base: calibrated where it has no current spec, exported, verified, published."""
    with steps.step("look up"):
        spec = known_spec(repository, id_, work.spec)
    if spec is None:
        with steps.step("calibrate"):
            spec = calibrated(repository, id_, work.spec or DEFAULT_SPEC)
    with steps.step("export"):
        made = export(repository, id_, spec, work.targets, settings=work.settings)
    is_known = made.reused and (work.verify == NOT_VERIFIED or is_verified(made.bundle, work.verify))
    if work.verify != NOT_VERIFIED and not is_known:
        with steps.step("verify"):
            verify(repository, made.bundle, work.verify, work.threads)
    return _ended(work, repository, id_, steps, made.bundle, is_known, spec.stem)


def _attached(work: Work, repository: Repository, checkpoint_id: str, steps: Steps) -> Outcome:
    """An adapter: no spec, no calibration; what it draws on its base's engine is what is verified."""
    with steps.step("export"):
        made = export_adapter(repository, checkpoint_id)
    engine = Path(made.base_bundle) if made.base_bundle else None
    is_known = made.reused and (work.verify == NOT_VERIFIED or is_verified(made.bundle, work.verify, engine))
    if work.verify != NOT_VERIFIED and not is_known:
        with steps.step("verify"):
            verify_attached(repository, made.bundle, engine, work.verify, work.threads)
    return _ended(work, repository, checkpoint_id, steps, made.bundle, is_known, engine=engine)


def _ended(
    work: Work,
    repository: Repository,
    id_: str,
    steps: Steps,
    bundle: Path,
    is_known: bool,
    spec: str = "",
    engine: Path | None = None,
) -> Outcome:
    """Publish a bundle where that was asked for, and say what was made. engine: of its base, for an adapter."""
    if work.store:
        with steps.step("publish"):
            is_known = not Remote(work.store).publish(bundle, repository.whole(id_).card) and is_known
    return Outcome(
        id_,
        "reused" if is_known else "done",
        bundle=bundle.name,
        spec=spec,
        verified=verified_level(bundle, engine),
        bytes=sum(entry.bytes for entry in read_any(bundle).files.values()),
        seconds=steps.seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


_KINDS: dict[str, Callable[[Work, str, Steps], Outcome]] = {
    "family": _trace,
    "base": _base,
    "checkpoint": _checkpoint,
}


def known_spec(repository: Repository, checkpoint_id: str, name: str) -> Path | None:
    """The spec to export under, made for the checkpoint or base as it is now; None when it must be calibrated first.

    An unquantised one is taken only when it was named.
    """
    if name in STORAGES:
        return reference_spec(repository, checkpoint_id, name)
    path = repository.root / "specs" / folder_name(checkpoint_id) / f"{name}.json"
    if not name:
        try:
            path = last_spec(repository, checkpoint_id)
        except SpecError:
            return None
    return path if path.stem not in STORAGES and is_current(path, repository, checkpoint_id) else None


def calibrated(repository: Repository, checkpoint_id: str, name: str) -> Path:
    """Calibrate with the policy and bits in a spec's name, 'taq-w8a8', and return the spec's path."""
    from calibration.calibrate import CalibrateOptions, calibrate

    policy, _, bits = name.rpartition("-")
    return calibrate(repository, checkpoint_id, CalibrateOptions(policy=policy, bits=bits)).spec_path


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
