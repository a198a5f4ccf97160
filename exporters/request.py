"""Interpret an export request: which spec is meant, and which targets this version can build."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from personalq.architecture import family_key, read_configs
from personalq.cards.card import folder_name
from personalq.errors import EngineError, SpecError
from personalq.repository import Repository
from personalq.repository.identity import weights_sha256
from personalq.spec import read_spec

from .export import ExportResult, export_checkpoint
from .external_data import Report, silent
from .graphs.family import open_family
from .lint import lint_trt
from .plain import STORAGES, unquantised_spec
from .targets.optimum import OptimumResult, refuse_existing, write_optimum
from .targets.settings import BuildSettings, of_merged, read_settings
from .targets.tensorrt import GRAPH, MODULES, build_plan, ranks_of, require

logger = logging.getLogger("personalq.exporters")

MADE = ("onnxruntime", *MODULES)
TIMING = "engines"  # in the repository: TensorRT timing caches, one file per version and GPU


def export_request(
    repository: Repository,
    checkpoint_id: str,
    spec: Path | None,
    targets: Sequence[str],
    progress: Report = silent,
    settings: Sequence[str] = (),
) -> ExportResult:
    """Export one checkpoint, and build its plans; `spec` None takes the one that was calibrated last.

    spec 'fp16' or 'fp32' needs no calibration.
    settings: 'KEY=VALUE' of a TensorRT engine (exporters.targets.settings). Raises EngineError for a target that cannot be
    made here, before anything is written, and what `export_checkpoint` and `build_plan` raise.
    """
    asked = read_settings(settings)
    chosen = of_merged(asked)
    if any(asked.rank) and set(targets) & set(MODULES):
        logger.warning("%s: its bundle takes no adapters, so the plan of rank 0 alone is built", checkpoint_id)
    return _with_plans(export_checkpoint, repository, checkpoint_id, spec, targets, progress, chosen)


def base_request(
    repository: Repository,
    base_id: str,
    spec: Path | None,
    targets: Sequence[str],
    progress: Report = silent,
    settings: Sequence[str] = (),
) -> ExportResult:
    """The same of a base, whose engine takes adapters, with a plan for each rank of theirs; its spec calibrated last."""
    from .export import export_base

    return _with_plans(export_base, repository, base_id, spec, targets, progress, read_settings(settings))


def _with_plans(
    export: Callable[[Repository, str, Path, Report], ExportResult],
    repository: Repository,
    id_: str,
    spec: Path | None,
    targets: Sequence[str],
    progress: Report,
    settings: BuildSettings,
) -> ExportResult:
    """A bundle, and its plans; what cannot be made here is refused before anything is written."""
    for target in targets:
        if target not in MADE:
            made = ", ".join(MADE)
            raise EngineError(f"target: must be one that this version makes ({made}), got {target!r}; leave it out")
        if target in MODULES:
            require(target)
    result = export(repository, id_, meant_spec(repository, id_, spec, progress), progress)
    wanted = [(one, rank) for one in targets if one in MODULES for rank in ranks_of(result.bundle, settings)]
    for target, rank in wanted:
        timing = repository.root / TIMING
        built = build_plan(result.bundle, timing, target, settings, lambda text: progress(text, 0.95), rank=rank)
        for line in built.mismatches or ():
            logger.warning("%s%s: %s", target, f" of rank {rank}" if rank else "", line)
        result = replace(result, engines=(*result.engines, built.engine.manifest.key))
    return result


def optimum_request(
    repository: Repository, checkpoint_id: str, spec: Path | None, folder: Path, progress: Report = silent
) -> OptimumResult:
    """Write the folder that Hugging Face optimum loads; `spec` as in `export_request`. Raises what `write_optimum` does."""
    refuse_existing(folder)
    return write_optimum(
        repository, checkpoint_id, meant_spec(repository, checkpoint_id, spec, progress), folder, progress
    )


def meant_spec(repository: Repository, checkpoint_id: str, spec: Path | None, progress: Report = silent) -> Path:
    """The spec's file: `spec` itself, the reference of that name, or the one that was calibrated last."""
    if spec is not None and str(spec) in STORAGES and not spec.is_file():
        return reference_spec(repository, checkpoint_id, str(spec), progress)
    return spec or last_spec(repository, checkpoint_id)


def lint_result(result: ExportResult) -> tuple[dict[str, Any], list[str], int]:
    """What `--lint trt` says about an exported bundle: JSON, lines for people, and the exit status (1: an error)."""
    findings = lint_trt(result.bundle / GRAPH)
    data = {"bundle": str(result.bundle), "key": result.key, "lint": [asdict(one) for one in findings]}
    lines = [one.line() for one in findings] or [f"{GRAPH}: nothing to say"]
    return data, lines, int(any(one.severity == "error" for one in findings))


def reference_spec(repository: Repository, checkpoint_id: str, name: str, progress: Report = silent) -> Path:
    """A checkpoint's or base's unquantised spec `name`, the one 'calibrate --policy' wrote or a new one made from its family."""
    path = repository.root / "specs" / folder_name(checkpoint_id) / f"{name}.json"
    if is_current(path, repository, checkpoint_id):
        return path
    whole = repository.whole(checkpoint_id)
    family = open_family(repository.root / "families", whole.base_dir, progress)
    sha256 = weights_sha256(whole.base_dir, whole.checkpoint_dir)
    return unquantised_spec(family, checkpoint_id, sha256, name).write(path)


def is_current(path: Path, repository: Repository, checkpoint_id: str) -> bool:
    """Whether there is a spec, made for the checkpoint's or base's weights and architecture as they are now."""
    if not path.is_file():
        return False
    spec, whole = read_spec(path).spec, repository.whole(checkpoint_id)
    sha256 = weights_sha256(whole.base_dir, whole.checkpoint_dir)
    return (spec.provenance.checkpoint_sha256, spec.family) == (sha256, family_key(read_configs(whole.base_dir)))


def last_spec(repository: Repository, checkpoint_id: str) -> Path:
    """The checkpoint's or base's newest spec; an unquantised reference only when there is no other. Raises SpecError."""
    specs = list((repository.root / "specs" / folder_name(checkpoint_id)).glob("*.json"))
    if not specs:
        is_base = checkpoint_id in repository.bases() and not repository.has_weights(checkpoint_id)
        how = f"run 'personalq calibrate {'--base ' if is_base else ''}{checkpoint_id}'"
        raise SpecError(f"{checkpoint_id}: must have a spec before it is exported, got none; {how}")
    return max(specs, key=lambda file: (file.stem not in STORAGES, file.stat().st_mtime_ns, file.name))
