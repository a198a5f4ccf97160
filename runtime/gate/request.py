"""Interpret a request to the gate: which bundle, what is available beside it, which judge, which reports."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from personalq.adapters import is_adapter, read_adapter_manifest
from personalq.bundle import Manifest, read_manifest
from personalq.cards.card import folder_name
from personalq.errors import BundleError, PersonalQError
from personalq.goldens import GOLDEN, VERSION
from personalq.repository import Repository
from personalq.repository.atomic import write_atomic
from personalq.repository.identity import weights_sha256
from personalq.repository.results import Whole
from personalq.repository.settings import read_settings
from personalq.spec import REFERENCE
from personalq.weights.header import read_header

from ..store import REFERENCE_POLICIES, Found, Store
from ..targets import FALLBACK
from .baseline import default_file
from .check import Report, headline
from .gate import OPENS, Options, run_gate
from .subject import Delta, Judge, ReadWeight, Sources

NO_REFERENCE = "none"  # in a key's parts: the exporter found no reference beside the spec

# (base folder, checkpoint folder, kind) -> an object whose component(name).read(parameter) gives tensors.
OpenWeights = Callable[[Path, Path | None, str], Any]


@dataclass(frozen=True)
class Request:
    """What was asked for. bundle: a folder or a checkpoint's id; the other fields are the command's options."""

    bundle: str
    level: str = "images"
    baseline: Path | None = None
    update_baseline: bool = False
    against: str = ""
    pictures: int = 4
    judge: str = ""
    threads: int | None = None
    junit: Path | None = None
    markdown: Path | None = None
    html: Path | None = None


@dataclass(frozen=True)
class Answer:
    """The report and the files that were written."""

    report: Report
    baseline: Path | None
    reports: list[str]


def answer(request: Request, opened: Callable[[], Repository], open_weights: Callable[[], OpenWeights]) -> Answer:
    """Find the bundle, run the gate, write what was asked for. Raises PersonalQError for what cannot be asked."""
    found, repository = located(request.bundle, opened)
    folder = found.bundle
    sources = sources_of(folder, repository, open_weights, request.judge, found.adapter)
    file = request.baseline
    if request.update_baseline and file is None:
        file = default_file(repository.root) if repository is not None else folder.with_suffix(".baselines.json")
    options = Options(
        threads=request.threads,
        level=request.level,
        extra_pictures=request.pictures,
        baseline=file,
        update=request.update_baseline,
        against=request.against,
    )
    report = run_gate(folder, options, sources, found.adapter)
    report = _with_cure(report, found, repository)
    updated = file if request.update_baseline and report.passed else None
    return Answer(report, updated, write_reports([report], request))


def located(bundle: str, opened: Callable[[], Repository]) -> tuple[Found, Repository | None]:
    """A folder, with the repository it lies in, or the best form of a checkpoint's or base's id.

    Raises EngineError for an adapter whose base has no engine here.
    """
    folder = Path(bundle)
    if not folder.is_dir():
        repository = opened()
        store = Store(repository.root)
        is_base = bundle in repository.bases() and not repository.has_weights(bundle)
        # of a checkpoint only its card is asked for: bundles are judged where no weights are, too
        return store.on_base(bundle) if is_base else store.find(repository.card(bundle).id), repository
    root = folder.resolve().parents[1]
    is_inside = folder.resolve().parent.name == "bundles" and (root / "checkpoints").is_dir()
    within = Repository.open(root) if is_inside else None
    if is_adapter(folder):
        return _attached(folder, within), within
    return Found(folder, FALLBACK), within


def _attached(folder: Path, repository: Repository | None) -> Found:
    """An adapter's folder beside the best engine of its base."""
    manifest = read_adapter_manifest(folder)
    engines = [] if repository is None else repository.base_engines(manifest.base_sha256)
    if not engines:
        raise BundleError(
            f"{folder.name[:12]}: must have an engine of its base beside it, got none; run 'personalq export --base "
            f"{manifest.checkpoint.base}'"
        )
    quantised = [engine for engine in engines if read_manifest(engine).spec.policy not in REFERENCE_POLICIES]
    return Found((quantised or engines)[-1], FALLBACK, adapter=folder)


def _with_cure(report: Report, found: Found, repository: Repository | None) -> Report:
    """The same report; where there are no goldens, the check that needs them says how they are made."""
    if all(check.name != OPENS for check in report.failed):
        return report
    reason = _no_goldens(found, repository)
    if not reason:
        return report
    checks = tuple(
        replace(check, name="reference", reason=reason) if check.name == OPENS else check for check in report.checks
    )
    return replace(report, checks=checks, headline=headline(report.subject, checks))


def _no_goldens(found: Found, repository: Repository | None) -> str:
    """Why there are none, and what makes them; '' when there are, or when the bundle lost its own."""
    wanted = "must hold what torch computes in FP32 (a reference), got"
    if found.adapter is not None:
        id_ = read_adapter_manifest(found.adapter).checkpoint.id
        if repository is None or (repository.root / "specs" / folder_name(id_) / REFERENCE).is_file():
            return ""
        quoted, place = shlex.quote(id_), f"specs/{folder_name(id_)}/{REFERENCE}"
        return (
            f"{place}: {wanted} no file; run: personalq calibrate {quoted} --policy fp16 && personalq verify {quoted}"
        )
    manifest = read_manifest(found.bundle)
    if (found.bundle / GOLDEN).is_file() or manifest.key_parts.get("reference") != NO_REFERENCE:
        return ""
    return f"{GOLDEN}: {wanted} a bundle exported without; {_cure(manifest, repository)}"


def _cure(manifest: Manifest, repository: Repository | None) -> str:
    """The commands that make a reference, as cheaply as it can be made, and a bundle that holds it."""
    id_, policy = manifest.checkpoint.id, manifest.spec.policy
    quoted, base = shlex.quote(id_), "--base " if manifest.kind == "base" else ""
    made = repository is not None and _has_reference(repository.root / "specs" / folder_name(id_), manifest)
    calibrate = (
        ""
        if made
        else f"personalq calibrate {base}{quoted} --policy {policy if policy in REFERENCE_POLICIES else 'fp16'} && "
    )
    if policy in REFERENCE_POLICIES:
        return f"run: {calibrate}personalq export {base}{quoted} --spec {policy} && personalq verify {quoted}"
    here = f"specs/{folder_name(id_)}/"
    return f"run: {calibrate}personalq export {base}{quoted} --spec FILE, with the spec's file in {here} beside {REFERENCE}"


def _has_reference(specs: Path, manifest: Manifest) -> bool:
    """Tell whether a reference of the bundle's own weights was made since."""
    try:
        metadata = read_header(specs / REFERENCE).metadata
    except PersonalQError:
        return False
    return (metadata.get("version"), metadata.get("checkpoint_sha256")) == (VERSION, manifest.checkpoint.sha256)


def sources_of(
    folder: Path,
    repository: Repository | None,
    open_weights: Callable[[], OpenWeights],
    judge: str = "",
    adapter: Path | None = None,
) -> Sources:
    """The checkpoint's weights and its unquantised form, where the repository still has them; the judge asked for.

    adapter: the checkpoint's, attached to the bundle in `folder`.
    """
    try:
        id_ = read_manifest(folder).checkpoint.id if adapter is None else read_adapter_manifest(adapter).checkpoint.id
    except PersonalQError:  # no bundle: the gate says so
        return Sources()
    scores = load_judge(judge, id_) if judge else None
    if repository is None:
        return Sources(judge=scores)
    try:
        whole = repository.whole(id_)
    except PersonalQError:  # the checkpoint was removed: the bundle is judged alone
        return Sources(judge=scores)
    base, checkpoint = whole.base_dir, whole.checkpoint_dir
    own = open_weights()(base, checkpoint, whole.card.kind)
    found = Sources(
        weights=_reader(own),
        weights_sha256=lambda: weights_sha256(base, checkpoint),
        settings=read_settings(base, checkpoint),
        reference=_reference(
            Store(repository.root), whole.card.base if adapter else id_, folder, weights_sha256(base, None)
        ),
        judge=scores,
    )
    return found if adapter is None else _of_attached(found, whole, own, open_weights(), repository)


def _of_attached(found: Sources, whole: Whole, own: Any, opens: OpenWeights, repository: Repository) -> Sources:
    """The same where the graphs are the base's: its weights and settings for them, the checkpoint's as a delta."""
    assert found.weights is not None and found.weights_sha256 is not None and found.settings is not None
    card, base = whole.card, whole.base_dir
    delta = Delta(
        merged=found.weights,
        changed={name: part.changed for name, part in own.components.items() if part.changed},
        first_added_id=own.first_added_id,
        learned=tuple((token, tuple(pieces)) for token, pieces in own.added_tokens),
        trigger=tuple(card.trigger),
        class_noun=card.class_noun,
        weights_sha256=found.weights_sha256,
        settings=found.settings,
    )
    return replace(
        found,
        weights=_reader(opens(base, None, card.kind)),
        weights_sha256=lambda: weights_sha256(base, None),
        settings=read_settings(base),
        delta=delta,
        golden=repository.root / "specs" / folder_name(card.id) / REFERENCE,
    )


def _reference(store: Store, owner: str, folder: Path, base_sha256: str) -> Path | None:
    """The owner's unquantised bundle, to draw more pictures with; None when that is the one judged, or of another base."""
    for other in store.bundles(owner):
        manifest = read_manifest(other)
        fits = manifest.kind != "base" or manifest.key_parts.get("weights") == base_sha256
        if manifest.spec.policy == REFERENCE_POLICIES[0] and fits:
            return other if other.resolve() != folder.resolve() else None
    return None


def _reader(weights: Any) -> ReadWeight:
    return lambda component, name: np.asarray(weights.component(component).read(name))


def load_judge(name: str, checkpoint_id: str) -> Judge:
    """Call MODULE:FUNCTION with the checkpoint's id. Raises BundleError when there is no such function."""
    module, _, function = name.partition(":")
    try:
        made: Judge = getattr(import_module(module), function)(checkpoint_id)
    except (ImportError, AttributeError, ValueError) as error:
        raise BundleError(f"--judge: must be MODULE:FUNCTION that can be imported, got {name!r} ({error})") from error
    return made


def write_reports(reports: Sequence[Report], asked: Request) -> list[str]:
    """Write each report that was asked for; return their paths."""
    from .reports.html import html
    from .reports.junit import junit
    from .reports.markdown import markdown

    wanted = [(asked.junit, junit), (asked.markdown, markdown), (asked.html, html)]
    for path, render in wanted:
        if path is not None:
            write_atomic(path, render(reports).encode())
    return [str(path) for path, _ in wanted if path is not None]
