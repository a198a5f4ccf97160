"""One checkpoint, wherever it runs: calibrate unless it has a current spec, export, build, verify.

Every step is content-addressed or checks for existing results first, so a task may be repeated, also after a kill.
"""

import logging
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from exporters.graphs.family import open_family
from exporters.plain import STORAGES
from exporters.request import export_request, is_current, last_spec, reference_spec
from personalq.bundle import read_manifest
from personalq.cards.card import folder_name
from personalq.errors import PersonalQError, SpecError
from personalq.repository import Repository
from personalq.repository.remote import Remote

from .verified import is_verified, verified_level, verify
from .work import DEFAULT_SPEC, NOT_VERIFIED, Outcome, Task, Work

logger = logging.getLogger("personalq.fleet")


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
        made = _trace(work, task.id, steps) if task.kind == "family" else _export(work, task.id, steps)
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


def _export(work: Work, checkpoint_id: str, steps: Steps) -> Outcome:
    with steps.step("look up"):
        repository = Repository.open(work.root)
        repository.checkpoint_dir(checkpoint_id)
        spec = known_spec(repository, checkpoint_id, work.spec)
    if spec is None:
        with steps.step("calibrate"):
            spec = calibrated(repository, checkpoint_id, work.spec or DEFAULT_SPEC)
    with steps.step("export"):
        made = export_request(repository, checkpoint_id, spec, work.targets, settings=work.settings)
    is_known = made.reused and (work.verify == NOT_VERIFIED or is_verified(made.bundle, work.verify))
    if work.verify != NOT_VERIFIED and not is_known:
        with steps.step("verify"):
            verify(repository, made.bundle, work.verify, work.threads)
    if work.store:
        with steps.step("publish"):
            is_known = not Remote(work.store).publish(made.bundle, repository.card(checkpoint_id)) and is_known
    return Outcome(
        checkpoint_id,
        "reused" if is_known else "done",
        bundle=made.key,
        spec=spec.stem,
        verified=verified_level(made.bundle),
        bytes=sum(entry.bytes for entry in read_manifest(made.bundle).files.values()),
        seconds=steps.seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def known_spec(repository: Repository, checkpoint_id: str, name: str) -> Path | None:
    """The spec to export under, made for the checkpoint as it is now; None when it must be calibrated first.

    An unquantised one is taken only when it was named.
    """
    if name in STORAGES:
        return reference_spec(repository, checkpoint_id, name)
    card = repository.card(checkpoint_id)
    path = repository.root / "specs" / folder_name(card.id) / f"{name}.json"
    if not name:
        try:
            path = last_spec(repository, card.id)
        except SpecError:
            return None
    return path if path.stem not in STORAGES and is_current(path, repository, card.id) else None


def calibrated(repository: Repository, checkpoint_id: str, name: str) -> Path:
    """Calibrate with the policy and bits in a spec's name, 'taq-w8a8', and return the spec's path."""
    from calibration.calibrate import CalibrateOptions, calibrate

    policy, _, bits = name.rpartition("-")
    return calibrate(repository, checkpoint_id, CalibrateOptions(policy=policy, bits=bits)).spec_path


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
