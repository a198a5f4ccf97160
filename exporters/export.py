"""Checkpoint + spec -> bundle: content-addressed, written beside its place and renamed into it, reused when it exists."""

import logging
import resource
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from personalq.bundle import (
    MANIFEST,
    SPEC,
    CheckpointEntry,
    FileEntry,
    Graphs,
    Latent,
    Manifest,
    Rows,
    Sizes,
    SpecEntry,
    Text,
    bundle_key,
    check_files,
    file_sha256,
    files_sha256,
    manifest_bytes,
    read_manifest,
)
from personalq.cards.card import Card
from personalq.errors import BundleError, SpecError
from personalq.repository import Repository
from personalq.repository.atomic import atomic_directory, settle
from personalq.repository.identity import weights_sha256
from personalq.repository.settings import Settings, read_settings
from personalq.repository.sharing import link_shared, note_shared
from personalq.spec import REFERENCE, SpecFile, read_spec
from personalq.weights.checkpoint import CheckpointWeights, ComponentWeights, open_weights
from personalq.weights.models import TOKEN_EMBEDDING

from .external_data import Report, silent, write_graph
from .graphs.family import Family, open_family
from .graphs.lower_ort import STORAGE, Lowered, lower_unet, store_floats
from .graphs.lower_trt import lower_unet_trt
from .graphs.passes.rows import emit_storage_form
from .lock import only_one
from .share import write_sharing_graph
from .tokenizer import write_tokenizers

logger = logging.getLogger("personalq.exporters")

EXPORTER_VERSION = "7"


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
    """Export one checkpoint under one spec into `<repository>/bundles/<key>/` and return where it is.

    Raises RepositoryError, SpecError or BundleError, each one line; on any failure nothing is left behind.
    """
    started = time.perf_counter()
    card, spec_file = repository.card(checkpoint_id), read_spec(spec_path)
    base_dir, reference = repository.base_dir(card), spec_path.parent / REFERENCE
    progress("reading weights", 0.0)
    checkpoint_dir = repository.checkpoint_dir(card.id)
    weights, settings = open_weights(base_dir, checkpoint_dir, card.kind), read_settings(base_dir, checkpoint_dir)
    family = open_family(repository.root / "families", base_dir, progress)
    stems = sorted(file.stem for file in checkpoint_dir.glob("*.safetensors"))
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
    check_fits(spec_file, card, parts)
    key = bundle_key(parts)
    folder = repository.root / "bundles" / key
    with only_one(folder):
        reused = is_intact(folder)
        if not reused:
            with atomic_directory(folder, replace=True) as temporary:
                job = Job(entry, settings, weights, family, spec_file, parts, key, temporary, progress)
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


@dataclass
class Job:
    """Everything one export needs; `drafts` collects manifest fields as the parts are written."""

    checkpoint: CheckpointEntry
    settings: Settings
    weights: CheckpointWeights
    family: Family
    spec_file: SpecFile
    parts: dict[str, str]
    key: str
    folder: Path
    progress: Report


def check_fits(spec_file: SpecFile, card: Card, parts: dict[str, str]) -> None:
    """Refuse a spec made for another checkpoint, other weights or another architecture."""
    spec = spec_file.spec
    for field, wanted, found in (
        ("checkpoint", card.id, spec.checkpoint),
        ("family", parts["family"], spec.family),
        ("provenance.checkpoint_sha256", parts["weights"], spec.provenance.checkpoint_sha256),
    ):
        if found != wanted:
            raise SpecError(
                f"spec {spec.name}: {field}: must be {wanted}, got {found!r}; run 'personalq calibrate {card.id}'"
            )


def is_intact(folder: Path) -> bool:
    """True when a finished bundle of this key is already there, byte for byte."""
    try:
        return not check_files(folder, read_manifest(folder))
    except BundleError:
        return False


def write_bundle(job: Job) -> None:
    """Write every graph, its weights, the tokenizer and the manifest into the job's folder."""
    unet = job.weights.component("unet")
    lowered = lower_unet(job.family.graph("unet"), job.spec_file)
    where = job.folder / "unet.ort.onnx"
    write_graph(lowered.model, lowered.tensors, unet.read, where, "weights.data", part(job, "UNet", 0.1, 0.8))
    with ThreadPoolExecutor(1) as disk:  # the largest file goes to disk while the others are made
        settled = disk.submit(settle, job.folder / "weights.data")
        write_parts(job, lowered)
    settled.result()


def write_parts(job: Job, lowered: Lowered) -> None:
    """Everything beside the UNet's first graph and its weights."""
    spec = job.spec_file.spec
    unet = job.weights.component("unet")
    trt = lower_unet_trt(job.family.graph("unet"), job.spec_file)
    write_sharing_graph(trt.model, trt.tensors, unet.read, job.folder / "unet.trt.onnx", lowered.model)
    rows = job.family.graph("text_rows")
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
        tensors = store_floats(model, set(), storage)
        report = part(job, name.replace("_", " "), 0.8, 0.95)
        write_graph(model, tensors, source.read, job.folder / f"{name}.onnx", f"{name}.data", report)
    text = write_tokenizers(job.settings, job.weights, job.folder)
    job.spec_file.write(job.folder / SPEC)
    (job.folder / MANIFEST).write_bytes(manifest_bytes(manifest_of(job, lowered, text)))


def manifest_of(job: Job, lowered: Lowered, text: Text) -> Manifest:
    """Everything a runtime needs to know, hashes left out."""
    spec = job.spec_file.spec
    return Manifest(
        key=job.key,
        key_parts=job.parts,
        checkpoint=job.checkpoint,
        family=job.family.key,
        exporter_version=EXPORTER_VERSION,
        spec=SpecEntry(
            name=spec.name, policy=spec.policy, bits=spec.bits, sha256=job.parts["spec"], storage=spec.storage
        ),
        graphs=Graphs(
            unet={"ort": "unet.ort.onnx", "trt": "unet.trt.onnx"},
            text_rows="text_rows.onnx",
            text_encoder="text_encoder.onnx",
            text_encoder_2="text_encoder_2.onnx" if "text_encoder_2" in job.family.configs else "",
            vae_decoder="vae_decoder.onnx",
        ),
        rows=Rows(
            form="full" if spec.is_float else "split",
            width=sum(2 * layer.width for layer in spec.rows.layers),
            layers=spec.rows.layers,
            kept=spec.rows.kept,
            is_open=True,
        ),
        text=text,
        latent=latent_of(job.settings.configs),
        scheduler=job.settings.scheduler.settings,
        sources=dict(job.settings.sources),
        **job.settings.sampling(),
        sizes=unet_sizes(job, lowered),
        census=lowered.census,
        unquantised=lowered.unquantised,
        versions={name: version(name) for name in ("onnx-ir", "numpy")},
    )


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


def checkpoint_entry(card: Card, sha256: str, files: Sequence[str] = ()) -> CheckpointEntry:
    """What a bundle says of its checkpoint. sha256: of the weights; files: the stems of its own."""
    return CheckpointEntry(
        id=card.id,
        name=card.name,
        kind=card.kind,
        base=card.base,
        trigger=tuple(card.trigger),
        class_noun=card.class_noun,
        sha256=sha256,
        files=tuple(files),
    )


def fit_vocabulary(model: ir.Model, weights: ComponentWeights) -> None:
    """Give the token embedding the checkpoint's number of rows (Textual Inversion adds some)."""
    name = next(name for name in model.graph.initializers if name.endswith(TOKEN_EMBEDDING))
    model.graph.initializers[name].shape = ir.Shape(weights.shape(name))


def latent_of(configs: dict[str, dict[str, Any]]) -> Latent:
    """The latent space as the VAE and UNet configs describe it."""
    vae, unet = configs["vae"], configs["unet"]
    return Latent(
        channels=vae["latent_channels"],
        height=unet["sample_size"],
        width=unet["sample_size"],
        scale=2 ** (len(vae["block_out_channels"]) - 1),
        scaling_factor=vae.get("scaling_factor", 0.18215),
        shift_factor=vae.get("shift_factor") or 0.0,
    )


def unet_sizes(job: Job, lowered: Lowered) -> Sizes:
    """Bytes on disk of UNet and text-row encoder; unquantised ones = the family's graphs + every weight at 2 or 4 bytes."""
    written = ("unet.ort.onnx", "weights.data", "text_rows.onnx", "text_rows.data")
    unet = job.weights.component("unet")
    n_weights = sum(_numel(unet.shape(name)) for name in unet.names())
    graphs = sum((job.family.folder / f"{name}.onnx").stat().st_size for name in ("unet", "text_rows"))
    return Sizes(
        unet=sum((job.folder / name).stat().st_size for name in written),
        unet_fp16=graphs + 2 * n_weights,
        unet_fp32=graphs + 4 * n_weights,
    )


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
