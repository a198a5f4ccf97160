"""Checkpoint or base + spec -> bundle: content-addressed, written beside its place and renamed into it, reused when it exists."""

import logging
import resource
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from personalq.adapters import is_intact
from personalq.bundle import (
    MANIFEST,
    SPEC,
    BranchPlace,
    FileEntry,
    bundle_key,
    file_sha256,
    files_sha256,
    manifest_bytes,
    read_manifest,
)
from personalq.cards.card import Card
from personalq.errors import RepositoryError, SpecError
from personalq.repository import Repository
from personalq.repository.atomic import atomic_directory, settle
from personalq.repository.described import checkpoint_entry
from personalq.repository.identity import weights_sha256
from personalq.repository.results import Whole
from personalq.repository.settings import read_settings
from personalq.repository.sharing import link_shared, note_shared
from personalq.spec import REFERENCE, SpecFile, read_spec
from personalq.weights.checkpoint import ComponentWeights, open_weights
from personalq.weights.models import TOKEN_EMBEDDING

from .external_data import Report, silent, write_graph
from .graphs.family import open_family
from .graphs.lower_ort import STORAGE, Lowered, lower_unet, store_floats
from .graphs.lower_trt import lower_unet_trt
from .graphs.passes.added import add_rows, open_encoder
from .graphs.passes.branches import Branches
from .graphs.passes.rows import emit_storage_form
from .lock import only_one
from .manifest import (
    BASE_UNETS,
    EXPORTER_VERSION,
    RANKS,
    Job,
    Places,
    latent_of,
    manifest_of,
)
from .share import write_sharing_graph
from .tokenizer import write_tokenizers

logger = logging.getLogger("personalq.exporters")


@dataclass(frozen=True)
class ExportResult:
    """bundle: its folder; bytes*: the UNet (graph, weights, text-row encoder) as exported and unquantised."""

    bundle: Path
    key: str
    bytes: int
    bytes_fp16: int
    bytes_fp32: int
    engines: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int
    reused: bool


def export_checkpoint(
    repository: Repository, checkpoint_id: str, spec_path: Path, progress: Report = silent
) -> ExportResult:
    """Export one checkpoint, merged, under one spec into `<repository>/bundles/<key>/` and return where it is.

    Raises RepositoryError, SpecError or BundleError, each one line; on any failure nothing is left behind.
    """
    card = repository.card(checkpoint_id)
    whole = Whole(card, repository.base_dir(card), repository.checkpoint_dir(card.id))
    return export_whole(repository, whole, spec_path, progress)


def export_base(repository: Repository, base_id: str, spec_path: Path, progress: Report = silent) -> ExportResult:
    """Export a base, whose graphs take adapters, as `export_checkpoint` exports a checkpoint."""
    whole = repository.whole(base_id)
    if not whole.is_base:
        raise RepositoryError(
            f"{base_id}: must be a base, got a checkpoint; export it with 'personalq export {base_id}'"
        )
    return export_whole(repository, whole, spec_path, progress)


def export_whole(repository: Repository, whole: Whole, spec_path: Path, progress: Report = silent) -> ExportResult:
    """Export a checkpoint over its base, merged; or a base as it is, whose graphs take adapters (docs/adapters.md)."""
    started = time.perf_counter()
    card, spec_file = whole.card, read_spec(spec_path)
    base_dir, reference = whole.base_dir, spec_path.parent / REFERENCE
    progress("reading weights", 0.0)
    checkpoint_dir = whole.checkpoint_dir
    weights, settings = open_weights(base_dir, checkpoint_dir, card.kind), read_settings(base_dir, checkpoint_dir)
    family = open_family(repository.root / "families", base_dir, progress)
    stems = sorted(file.stem for file in checkpoint_dir.glob("*.safetensors")) if checkpoint_dir else []
    entry = checkpoint_entry(card, weights_sha256(base_dir, checkpoint_dir), stems)
    for note in settings.scheduler.notes:
        logger.warning("%s: %s", card.base or card.id, note)
    told = {"checkpoint": entry.model_dump(), "latent": latent_of(settings.configs).model_dump()}
    parts = {
        "weights": entry.sha256,
        "settings": settings.sha256(told),
        "spec": spec_file.content_sha256(),
        "exporter": EXPORTER_VERSION,
        "family": family.key,
        "reference": file_sha256(reference) if reference.is_file() else "none",
    }
    check_fits(spec_file, card, parts, "--base " if whole.is_base else "")
    key = bundle_key(parts)
    folder = repository.root / "bundles" / key
    with only_one(folder):
        reused = is_intact(folder)
        if not reused:
            with atomic_directory(folder, replace=True) as temporary:
                job = Job(entry, whole.is_base, settings, weights, family, spec_file, parts, key, temporary, progress)
                write_bundle(job)
                if reference.is_file():
                    shutil.copyfile(reference, temporary / "golden.safetensors")
                finish(job, temporary, repository.root)
            files = read_manifest(folder).files
            note_shared(repository.root, folder, {name: entry.sha256 for name, entry in files.items()})
    sizes = read_manifest(folder).sizes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - started
    return ExportResult(
        folder, key, sizes.unet, sizes.unet_fp16, sizes.unet_fp32, ("onnxruntime",), seconds, peak, reused
    )


def check_fits(spec_file: SpecFile, card: Card, parts: dict[str, str], option: str = "") -> None:
    """Refuse a spec made for another checkpoint, other weights or another architecture. option: how 'calibrate' takes its id."""
    spec = spec_file.spec
    for field, wanted, found in (
        ("checkpoint", card.id, spec.checkpoint),
        ("family", parts["family"], spec.family),
        ("provenance.checkpoint_sha256", parts["weights"], spec.provenance.checkpoint_sha256),
    ):
        if found != wanted:
            raise SpecError(
                f"spec {spec.name}: {field}: must be {wanted}, got {found!r}; run 'personalq calibrate {option}{card.id}'"
            )


def write_bundle(job: Job) -> None:
    """Write every graph, its weights, the tokenizer and the manifest into the job's folder."""
    unet = job.weights.component("unet")
    lowered = lower_unet(job.family.graph("unet"), job.spec_file, branches=Branches() if job.is_base else None)
    where = job.folder / "unet.ort.onnx"
    write_graph(lowered.model, lowered.tensors, unet.read, where, "weights.data", part(job, "UNet", 0.1, 0.8))
    with ThreadPoolExecutor(1) as disk:  # the largest file goes to disk while the others are made
        settled = disk.submit(settle, job.folder / "weights.data")
        write_parts(job, lowered)
    settled.result()


def write_parts(job: Job, lowered: Lowered) -> None:
    """Everything beside the UNet's first graph and its weights."""
    spec = job.spec_file.spec
    places: Places = {"unet": write_other_unets(job, lowered)}
    rows = job.family.graph("text_rows")
    if job.is_base:
        add_rows(rows)
    if not spec.is_float:
        emit_storage_form(rows, spec.rows.layers, spec.rows.kept.slots)
    storage = STORAGE[spec.storage]
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in job.family.configs]
    for name, model, component in (
        ("text_rows", rows, "unet"),
        *((encoder, job.family.graph(encoder), encoder) for encoder in encoders),
        ("vae_decoder", job.family.graph("vae_decoder"), "vae"),
    ):
        source = job.weights.component(component)
        if name in encoders:
            fit_vocabulary(model, source)
            if job.is_base:
                places[name] = open_encoder(model, job.weights.first_added_id)
        tensors = store_floats(model, set(), storage)
        report = part(job, name.replace("_", " "), 0.8, 0.95)
        write_graph(model, tensors, source.read, job.folder / f"{name}.onnx", f"{name}.data", report)
    text = write_tokenizers(job.settings, job.weights, job.folder)
    job.spec_file.write(job.folder / SPEC)
    (job.folder / MANIFEST).write_bytes(manifest_bytes(manifest_of(job, lowered, text, places)))


def write_other_unets(job: Job, first: Lowered) -> dict[str, BranchPlace]:
    """The graphs that share the first one's weights: `trt`, and more of a base; return where adapters enter its UNet."""
    read, unet = job.weights.component("unet").read, partial(job.family.graph, "unet")
    for rank in (0, *RANKS) if job.is_base else (0,):
        trt = lower_unet_trt(unet(), job.spec_file, rank)
        file = BASE_UNETS[f"trt_rank{rank}" if rank else "trt"]
        write_sharing_graph(trt.model, trt.tensors, read, job.folder / file, first.model)
    if not job.is_base:
        return {}
    wide = lower_unet(unet(), job.spec_file, branches=Branches(is_wide=True))
    write_sharing_graph(wide.model, wide.tensors, read, job.folder / BASE_UNETS["ort_wide"], first.model)
    return wide.places


def fit_vocabulary(model: ir.Model, weights: ComponentWeights) -> None:
    """Give the token embedding the checkpoint's number of rows (Textual Inversion adds some)."""
    name = next(name for name in model.graph.initializers if name.endswith(TOKEN_EMBEDDING))
    model.graph.initializers[name].shape = ir.Shape(weights.shape(name))


def part(job: Job, name: str, start: float, end: float) -> Report:
    """Progress of one graph as a piece [start, end) of the whole export's."""
    return lambda text, done: job.progress(f"writing {name}: {text}", start + (end - start) * done)


def finish(job: Job, folder: Path, root: Path) -> None:
    """Share what other bundles have too, and record every file's hash in the manifest: the last thing written."""
    manifest = read_manifest(folder)
    paths = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    files = {
        path.name: FileEntry(sha256=sha256, bytes=path.stat().st_size)
        for path, sha256 in zip(paths, files_sha256(paths), strict=True)
    }
    link_shared(root, folder, {name: entry.sha256 for name, entry in files.items()})
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest.model_copy(update={"files": files})))
