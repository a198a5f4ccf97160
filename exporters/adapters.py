"""Checkpoint -> adapter bundle: its delta in run-time form and how it is drawn. No torch, no ONNX, no spec, in a second.

Content-addressed by the delta's bytes, the base's weights and what the manifest says; written beside its place and renamed
into it, reused when it exists. A change of the base's engines or specs makes no adapter anew.
"""

import hashlib
import json
import logging
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from personalq.adapters import ADAPTER, AdapterManifest, Correction, is_intact, read_adapter_manifest
from personalq.bundle import (
    MANIFEST,
    FileEntry,
    bundle_key,
    file_sha256,
    manifest_bytes,
)
from personalq.errors import RepositoryError
from personalq.repository import Repository
from personalq.repository.atomic import atomic_directory
from personalq.repository.described import adapter_manifest
from personalq.repository.forms import own_settings
from personalq.repository.identity import delta_sha256, weights_sha256
from personalq.repository.results import Report, silent
from personalq.repository.settings import read_settings
from personalq.weights.adapter import Adapter, Branch, Limits, adapter_of
from personalq.weights.checkpoint import CheckpointWeights, open_weights
from personalq.weights.deltas.lora import PEFT_CONFIG

from .lock import only_one

logger = logging.getLogger("personalq.exporters")

ADAPTER_VERSION = "1"  # of adapters alone: a change of the graphs does not make them anew


@dataclass(frozen=True)
class Corrected:
    """A low-rank correction of a base's rounding, layer of its UNet -> matrices, and which spec's rounding it is."""

    branches: Mapping[str, Branch]
    entry: Correction

    def sha256(self) -> str:
        """Of the matrices and of what they correct."""
        return hashlib.sha256(
            self.entry.model_dump_json().encode() + Adapter(correction=self.branches).to_bytes()
        ).hexdigest()


@dataclass(frozen=True)
class AdapterResult:
    """bundle: its folder; bytes: of adapter.safetensors; base_bundle: the best engine of its base here, '' without one.

    rank, errors, left_out: as in the manifest.
    """

    bundle: Path
    key: str
    bytes: int
    base_bundle: str
    rank: int
    errors: Mapping[str, float]
    left_out: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int
    reused: bool


def export_adapter(
    repository: Repository,
    checkpoint_id: str,
    limits: Limits | None = None,
    correction: Corrected | None = None,
    progress: Report = silent,
) -> AdapterResult:
    """Export one checkpoint's adapter into `<repository>/bundles/<key>/` and return where it is.

    limits: where its changes are cut to a rank, for a checkpoint that is no adapter exactly. Raises RepositoryError or
    BundleError, each one line; on any failure nothing is left behind.
    """
    started = time.perf_counter()
    limits = limits or Limits()
    progress("reading weights", 0.0)
    job = _job(repository, checkpoint_id, limits, correction)
    folder = repository.root / "bundles" / job.manifest.key
    with only_one(folder):
        reused = is_intact(folder)
        if not reused:
            with atomic_directory(folder, replace=True) as temporary:
                _write(job, limits, temporary, progress)
    manifest = read_adapter_manifest(folder)
    _say(manifest, job.notes)
    engines = repository.base_engines(manifest.base_sha256)
    return AdapterResult(
        folder,
        manifest.key,
        manifest.bytes,
        str(engines[-1]) if engines else "",
        manifest.rank,
        manifest.errors,
        manifest.left_out,
        time.perf_counter() - started,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        reused,
    )


@dataclass(frozen=True)
class _Job:
    """manifest: everything that is known before the matrices are made."""

    manifest: AdapterManifest
    weights: CheckpointWeights
    base_dir: Path
    correction: Mapping[str, Branch] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _job(repository: Repository, checkpoint_id: str, limits: Limits, correction: Corrected | None) -> _Job:
    whole = repository.whole(checkpoint_id)
    checkpoint_dir = whole.checkpoint_dir
    if checkpoint_dir is None or checkpoint_dir == whole.base_dir:
        raise RepositoryError(
            f"checkpoint {checkpoint_id!r}: must have its base beside it to be attached to, got a whole pipeline; "
            "export it with '--form merged'"
        )
    weights, settings = (
        open_weights(whole.base_dir, checkpoint_dir, whole.card.kind),
        read_settings(whole.base_dir, checkpoint_dir),
    )
    manifest = adapter_manifest(whole, weights, settings, weights_sha256(whole.base_dir, checkpoint_dir))
    found = {
        "left_out": own_settings(whole.base_dir, checkpoint_dir, settings),
        "correction": correction and correction.entry,
    }
    told = manifest.model_copy(update=found).model_dump(mode="json", exclude={"key_parts", "base_sha256"})
    parts = {
        "delta": delta_sha256(checkpoint_dir),
        "base": manifest.base_sha256,
        "settings": _sha256(told | {"peft": peft_settings(checkpoint_dir)}),
        "limits": f"rank {limits.rank}, energy {limits.energy!r}",
        "correction": correction.sha256() if correction else "none",
        "exporter": f"adapter {ADAPTER_VERSION}",
    }
    keyed = {"key": bundle_key(parts), "key_parts": parts, "exporter_version": ADAPTER_VERSION}
    manifest = manifest.model_copy(update={**found, **keyed})
    return _Job(manifest, weights, whole.base_dir, correction.branches if correction else {}, settings.scheduler.notes)


def peft_settings(checkpoint_dir: Path) -> dict[str, str]:
    """sha256 of what peft says of its LoRAs in files of their own: alpha is there, and in no weight file."""
    found = sorted(checkpoint_dir.rglob(PEFT_CONFIG))
    return {file.relative_to(checkpoint_dir).as_posix(): file_sha256(file) for file in found}


def _write(job: _Job, limits: Limits, folder: Path, progress: Report) -> None:
    """The tensors, then the manifest with their hash."""
    base = open_weights(job.base_dir, None, job.manifest.checkpoint.kind)
    made = adapter_of(job.weights, base, limits, progress)
    whole = replace(made, correction=job.correction)
    data = whole.to_bytes()
    (folder / ADAPTER).write_bytes(data)
    branches = ((f"{part}.{layer}", one) for part, layers in whole.branches.items() for layer, one in layers.items())
    found = {
        "rank": whole.rank,
        "errors": {name: round(branch.error, 6) for name, branch in branches if branch.error},
        "left_out": (*job.manifest.left_out, *whole.left_out),
        "bytes": len(data),
        "files": {ADAPTER: FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))},
    }
    (folder / MANIFEST).write_bytes(manifest_bytes(job.manifest.model_copy(update=found)))
    progress("done", 1.0)


def _say(manifest: AdapterManifest, notes: tuple[str, ...]) -> None:
    """Warn of what the adapter lacks, and of what is not as the checkpoint's files say."""
    where = manifest.checkpoint.id
    for note in notes:
        logger.warning("%s: %s", where, note)
    if manifest.errors:
        worst = max(manifest.errors, key=lambda name: manifest.errors[name])
        logger.warning(
            "%s: layers cut to rank %d or less: %d; %s lacks %.1f %% of its change, the others less",
            *(where, manifest.rank, len(manifest.errors), worst, 100 * manifest.errors[worst]),
        )
    if left := manifest.left_out:
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        logger.warning("%s: left out of the adapter: %s", where, shown)


def _sha256(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
