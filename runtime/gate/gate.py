"""The gate: one bundle through every level, fast ones first, and a report. Never raises: what cannot be computed failed."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from personalq.adapters import read_adapter_manifest
from personalq.bundle import Manifest, read_manifest
from personalq.errors import PersonalQError

from ..drawing.attaching import Opened, open_adapter
from ..engines.sessions import one_line
from . import LEVELS
from . import baseline as baselines
from .check import Check, Pictures, Report, failed, headline, reason_of
from .levels import attachment, branches, integrity, kernels, numerics, obedience
from .levels.pictures import images
from .levels.targets import cross_target
from .localise import BLAMED, localise
from .subject import Sources, Subject

NUDGE = np.float32(2.0**-20)  # relative: roughly what another order of float additions does to a number
NOISY_RUNS = 2
OPENS = "bundle opens"

MEASURED = ("numerics", "images")  # the levels whose results a baseline stores

Computed = Callable[[Subject], Iterator[Check]]
OBEDIENCE: tuple[tuple[str, Computed], ...] = (
    ("spec in the graph", obedience.spec_in_graph),
    ("stored weights", obedience.stored_weights),
    ("kept rows' way", obedience.kept_rows_pass_no_quantiser),
    ("kept tokens", obedience.kept_tokens),
    ("rows' places", obedience.same_row_same_effect),
    ("kept rows", kernels.kept_rows),
    ("kept rows matter", kernels.kept_rows_matter),
    ("kernels", kernels.kernels),
    ("adapter", attachment.is_the_delta),
    ("adapter's way", branches.matrices_way),
    ("adapter's strength", branches.strength_counts),
    ("adapter's text strength", branches.text_strength_counts),
    ("adapter's trigger", attachment.trigger_in_goldens),
)
NUMERICS: tuple[tuple[str, Computed], ...] = (
    ("text encoder", numerics.text_encoder),
    ("text rows", numerics.text_rows),
    ("text rows by class", numerics.rows_by_class),
    ("unet", numerics.noise_prediction),
    ("inside the unet", numerics.inside_the_unet),
    ("scheduler", numerics.scheduler_step),
    ("vae decoder", numerics.decoder),
)


@dataclass(frozen=True)
class Options:
    """How to run the gate.

    level: the last one to run. extra_pictures: pairs beyond the goldens', where Sources has an unquantised bundle.
    baseline: file to compare with, or to write an entry of (update). against: another target to compare outputs with.
    blame: name the layer that moved first when numbers fail (a dozen more looks at the UNet).
    """

    threads: int | None = None
    level: str = "images"
    extra_pictures: int = 4
    baseline: Path | None = None
    update: bool = False
    against: str = ""
    blame: bool = True


def verify_bundle(bundle: Path, threads: int | None = None) -> Report:
    """Check a bundle by its own files only: files, spec, graphs, kernels, numbers, pictures."""
    return run_gate(bundle, Options(threads=threads))


def run_gate(bundle: Path, options: Options, sources: Sources | None = None, adapter: Path | None = None) -> Report:
    """Run the levels up to options.level, compare with a baseline or write it. Never raises.

    adapter: of the checkpoint that is judged, attached to `bundle`, its base's.
    """
    sources, started = sources or Sources(), time.perf_counter()
    try:
        judged = _judged(bundle, adapter)
    except (PersonalQError, OSError) as error:
        report = _ended(bundle, bundle.name[:12], [failed("files intact", one_line(error))])
        return replace(report, form="merged" if adapter is None else "attached", adapter=adapter)
    return replace(_report(judged, options, sources, started), form=judged.form, adapter=adapter)


@dataclass(frozen=True)
class _Judged:
    """What was read of the files: manifest of the bundle, the adapter where one is attached, whether all files are intact."""

    bundle: Path
    manifest: Manifest
    name: str
    form: str
    intact: tuple[Check, ...]
    opened: Opened | None = None

    @property
    def is_intact(self) -> bool:
        return all(check.passed for check in self.intact)


def _judged(bundle: Path, adapter: Path | None) -> _Judged:
    """Read manifests and hash files. Raises BundleError or OSError."""
    manifest = read_manifest(bundle)
    files = integrity.files_intact(bundle, manifest)
    if adapter is None:
        return _Judged(bundle, manifest, baselines.entry_name(manifest), manifest.kind, (files,))
    of_adapter = read_adapter_manifest(adapter)
    seen = manifest.model_copy(update={"kind": "base", "checkpoint": of_adapter.checkpoint})
    intact = (files, attachment.intact(adapter, of_adapter))
    opened = open_adapter(adapter) if all(check.passed for check in intact) else None
    return _Judged(bundle, manifest, baselines.entry_name(seen), "attached", intact, opened)


def _report(judged: _Judged, options: Options, sources: Sources, started: float) -> Report:
    """Every level that was asked for, up to the first that makes the next ones impossible."""
    bundle, name = judged.bundle, judged.name
    if not judged.is_intact:
        return _ended(bundle, name, judged.intact)
    checks = [*judged.intact, *_integrity(judged, sources)]
    if options.baseline is not None and options.level not in MEASURED:
        reason = f"needs the levels that measure something, got {options.level!r}; run {MEASURED[0]}"
        checks.append(failed("baseline", f"{options.baseline}: {reason}"))
    seconds = {"integrity": time.perf_counter() - started}
    if options.level == "integrity":
        return replace(_ended(bundle, name, checks), seconds=seconds)
    try:
        subject = Subject(bundle, judged.manifest, sources, options.threads, judged.opened)
        _ = subject.pipeline
    except Exception as error:  # the boundary: a bundle that cannot be opened is a failed check, whatever the cause
        return _ended(bundle, name, [*checks, failed(OPENS, reason_of(error))])
    return Run(subject, options, name, checks, seconds).report()


def _integrity(judged: _Judged, sources: Sources) -> list[Check]:
    """Whether bundle and adapter are what their keys say."""
    manifest, opened = judged.manifest, judged.opened
    checks = _guarded("key", "integrity", lambda: integrity.consistent(judged.bundle, manifest, sources))
    if opened is None:
        return checks
    return checks + _guarded("adapter", "integrity", lambda: attachment.consistent(opened.manifest, manifest, sources))


class Run:
    """The levels that need an open bundle, and what follows from them."""

    def __init__(
        self, subject: Subject, options: Options, name: str, checks: list[Check], seconds: dict[str, float]
    ) -> None:
        self.subject, self.options, self.name, self.checks, self.seconds = subject, options, name, checks, seconds
        self.pictures: Pictures | None = None
        self.before: dict[str, float] = {}

    def report(self) -> Report:
        wanted = LEVELS[: LEVELS.index(self.options.level) + 1]
        for level, table in (("obedience", OBEDIENCE), ("numerics", NUMERICS)):
            if level in wanted:
                self._timed(level, lambda table=table, level=level: run_table(self.subject, table, level))  # type: ignore[misc]
        if "images" in wanted:
            self._timed("images", self._images)
        if self.options.against:
            self._timed("targets", lambda: cross_target(self.subject, self.options.against))
        self._timed("baseline", self._baseline)
        found = _ended(self.subject.bundle, self.name, self.checks)
        subject = self.subject
        found = replace(found, measured=subject.measured, layers=_means(subject.layers), before=self.before)
        left_out = subject.sources.missing()
        return replace(found, pictures=self.pictures, seconds=self.seconds, left_out=left_out)

    def _timed(self, level: str, compute: Callable[[], Sequence[Check] | Iterator[Check]]) -> None:
        started = time.perf_counter()
        self.checks += _guarded(level, level, compute)
        self.seconds[level] = time.perf_counter() - started

    def _images(self) -> list[Check]:
        checks, self.pictures = images(self.subject, self.options.extra_pictures)
        return checks

    def _baseline(self) -> Iterator[Check]:
        subject, file = self.subject, self.options.baseline
        if file is None or self.options.level not in MEASURED:
            file = None
        elif not self.options.update:
            entry = baselines.read_baselines(file).bundles.get(self.name)
            if entry is None:
                yield failed("baseline", f"{file}: must have {self.name}, got nothing; run with --update-baseline")
                return
            measured = baselines.Measured(subject.measured, subject.layers)
            found = baselines.compare(entry, subject.manifest, subject.prompts, measured)
            self.before = _means(entry.layers)
            yield from found.checks
            self._blame(found.checks, found.moved, entry.decisions)
        self._blame([check for check in self.checks if check.level == "numerics"], (), {})
        if file is not None and self.options.update:
            yield from self._update(file)

    def _blame(self, checks: Sequence[Check], moved: Sequence[baselines.Moved], known: dict[str, str]) -> None:
        """Say once which layer moved first."""
        if self.options.blame and not any(check.name == BLAMED for check in self.checks):
            self.checks += localise(self.subject, checks, moved, known)

    def _update(self, file: Path) -> Iterator[Check]:
        """Write the entry of a bundle that passes; one that fails is not accepted."""
        wrong = [check for check in self.checks if not check.passed]
        if wrong:
            yield failed("baseline", f"{file}: not written: {wrong[0].name} failed; a baseline must pass by itself")
            return
        subject = self.subject
        noisy = [self._nudged(seed) for seed in range(NOISY_RUNS)]
        measured = baselines.Measured(subject.measured, subject.layers, noisy)
        entry = baselines.make_entry(subject.manifest, subject.spec_file.spec, subject.prompts, measured)
        baselines.update(file, self.name, entry)

    def _nudged(self, seed: int) -> baselines.Measured:
        """Metrics and layers again, from inputs that differ by one part in a million."""
        other = self.subject.nudged(NUDGE, seed)
        run_table(other, NUMERICS, "numerics")
        if self.options.level == "images":
            images(other, self.options.extra_pictures)
        return baselines.Measured(other.measured, other.layers)


def _means(layers: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: float(np.mean(values)) for name, values in layers.items()}


def run_table(subject: Subject, table: tuple[tuple[str, Computed], ...], level: str) -> list[Check]:
    """Every check of a level; one that cannot be computed is a failed check of the group's name."""
    checks: list[Check] = []
    for name, compute in table:
        checks += _guarded(name, level, lambda compute=compute: compute(subject))  # type: ignore[misc]
    return checks


def _guarded(name: str, level: str, compute: Callable[[], Sequence[Check] | Iterator[Check]]) -> list[Check]:
    checks: list[Check] = []
    try:
        for check in compute():
            checks.append(check if check.level else replace(check, level=level))
    except Exception as error:  # the boundary: a check that cannot be computed has failed
        checks.append(replace(failed(name, reason_of(error)), level=level))
    return checks


def _ended(bundle: Path, name: str, checks: Sequence[Check]) -> Report:
    done = tuple(check if check.level else replace(check, level="integrity") for check in checks)
    return Report(bundle, done, name, headline(name, done))
