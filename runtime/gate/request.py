"""Interpret a request to the gate: which bundle, what is available beside it, which judge, which reports."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from personalq.bundle import read_manifest
from personalq.errors import BundleError, PersonalQError
from personalq.repository import Repository
from personalq.repository.atomic import write_atomic
from personalq.repository.identity import weights_sha256
from personalq.repository.settings import read_settings

from ..store import REFERENCE_POLICIES, Store, find
from .baseline import default_file
from .check import Report
from .gate import Options, run_gate
from .subject import Judge, Sources

# (base folder, checkpoint folder, kind) -> an object whose component(name).read(parameter) gives tensors.
OpenWeights = Callable[[Path, Path, str], Any]


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
    folder, repository = located(request.bundle, opened)
    sources = sources_of(folder, repository, open_weights, request.judge)
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
    report = run_gate(folder, options, sources)
    updated = file if request.update_baseline and report.passed else None
    return Answer(report, updated, write_reports([report], request))


def located(bundle: str, opened: Callable[[], Repository]) -> tuple[Path, Repository | None]:
    """A folder, with the repository it lies in, or the best bundle of a checkpoint's id."""
    folder = Path(bundle)
    if not folder.is_dir():
        repository = opened()
        return find(repository.root, repository.card(bundle).id).bundle, repository
    root = folder.resolve().parents[1]
    is_inside = folder.resolve().parent.name == "bundles" and (root / "checkpoints").is_dir()
    return folder, Repository.open(root) if is_inside else None


def sources_of(
    folder: Path, repository: Repository | None, open_weights: Callable[[], OpenWeights], judge: str = ""
) -> Sources:
    """The checkpoint's weights and its unquantised bundle, where the repository still has them; the judge asked for."""
    try:
        id_ = read_manifest(folder).checkpoint.id
    except PersonalQError:  # no bundle: the gate says so
        return Sources()
    scores = load_judge(judge, id_) if judge else None
    if repository is None:
        return Sources(judge=scores)
    try:
        card = repository.card(id_)
        folders = repository.base_dir(card), repository.checkpoint_dir(id_)
    except PersonalQError:  # the checkpoint was removed: the bundle is judged alone
        return Sources(judge=scores)
    base, checkpoint = folders
    weights = open_weights()(base, checkpoint, card.kind)
    others = Store(repository.root).bundles(id_)
    reference = [other for other in others if read_manifest(other).spec.policy == REFERENCE_POLICIES[0]]
    return Sources(
        weights=lambda component, name: weights.component(component).read(name),
        weights_sha256=lambda: weights_sha256(base, checkpoint),
        settings=read_settings(base, checkpoint),
        reference=reference[0] if reference and reference[0].resolve() != folder.resolve() else None,
        judge=scores,
    )


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
