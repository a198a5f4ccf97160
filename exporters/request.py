"""What a person asks for when they export: which spec is meant, and which targets this version can make."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from personalq.card import folder_name
from personalq.errors import EngineError, SpecError
from personalq.repository import Repository

from .build_settings import read_settings
from .build_tensorrt import GRAPH, MODULES, build_plan, require
from .export import ExportResult, export_checkpoint
from .lint import lint_trt

logger = logging.getLogger("personalq.exporters")

MADE = ("onnxruntime", *MODULES)
TIMING = "engines"  # in the repository: what builders measured, one file per version and GPU
_REFERENCES = ("fp32", "fp16")


def export_request(
    repository: Repository,
    checkpoint_id: str,
    spec: Path | None,
    targets: Sequence[str],
    progress: Callable[[str], None] = lambda _: None,
    settings: Sequence[str] = (),
) -> ExportResult:
    """Export one checkpoint, and build its plans; `spec` None takes the one that was calibrated last.

    settings: 'KEY=VALUE' of a TensorRT engine (exporters.build_settings). Raises EngineError for a target that cannot be
    made here, before anything is written, and what `export_checkpoint` and `build_plan` raise.
    """
    chosen = read_settings(settings)
    for target in targets:
        if target not in MADE:
            made = ", ".join(MADE)
            raise EngineError(f"target: must be one that this version makes ({made}), got {target!r}; leave it out")
        if target in MODULES:
            require(target)
    result = export_checkpoint(repository, checkpoint_id, spec or last_spec(repository, checkpoint_id), progress)
    for target in (one for one in targets if one in MODULES):
        built = build_plan(result.bundle, repository.root / TIMING, target, chosen, progress)
        for line in built.mismatches or ():
            logger.warning("%s: %s", target, line)
        result = replace(result, engines=(*result.engines, built.engine.manifest.key))
    return result


def lint_result(result: ExportResult) -> tuple[dict[str, Any], list[str], int]:
    """What `--lint trt` says about an exported bundle: JSON, lines for people, and the exit status (1: an error)."""
    findings = lint_trt(result.bundle / GRAPH)
    data = {"bundle": str(result.bundle), "key": result.key, "lint": [asdict(one) for one in findings]}
    lines = [one.line() for one in findings] or [f"{GRAPH}: nothing to say"]
    return data, lines, int(any(one.severity == "error" for one in findings))


def last_spec(repository: Repository, checkpoint_id: str) -> Path:
    """The checkpoint's newest spec; an unquantised reference only when there is no other. Raises SpecError."""
    specs = list((repository.root / "specs" / folder_name(checkpoint_id)).glob("*.json"))
    if not specs:
        how = f"run 'personalq calibrate {checkpoint_id}'"
        raise SpecError(f"{checkpoint_id}: must have a spec before it is exported, got none; {how}")
    return max(specs, key=lambda file: (file.stem not in _REFERENCES, file.stat().st_mtime_ns, file.name))
