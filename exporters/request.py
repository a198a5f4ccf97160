"""What a person asks for when they export: which spec is meant, and which targets this version can make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from personalq.card import folder_name
from personalq.errors import EngineError, SpecError
from personalq.repository import Repository

from .export import ExportResult, export_checkpoint

MADE = ("onnxruntime",)
_REFERENCES = ("fp32", "fp16")


def export_request(
    repository: Repository,
    checkpoint_id: str,
    spec: Path | None,
    targets: Sequence[str],
    progress: Callable[[str], None] = lambda _: None,
) -> ExportResult:
    """Export one checkpoint; `spec` None takes the one that was calibrated last.

    Raises EngineError for a target that cannot be made here, and what `export_checkpoint` raises.
    """
    for target in targets:
        if target not in MADE:
            made = ", ".join(MADE)
            raise EngineError(f"target: must be one that this version makes ({made}), got {target!r}; leave it out")
    return export_checkpoint(repository, checkpoint_id, spec or last_spec(repository, checkpoint_id), progress)


def last_spec(repository: Repository, checkpoint_id: str) -> Path:
    """The checkpoint's newest spec; an unquantised reference only when there is no other. Raises SpecError."""
    specs = list((repository.root / "specs" / folder_name(checkpoint_id)).glob("*.json"))
    if not specs:
        how = f"run 'personalq calibrate {checkpoint_id}'"
        raise SpecError(f"{checkpoint_id}: must have a spec before it is exported, got none; {how}")
    return max(specs, key=lambda file: (file.stem not in _REFERENCES, file.stat().st_mtime_ns, file.name))
