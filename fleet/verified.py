"""Which bundles passed the gate, and up to which level: a note beside the manifest, so that a second run need not draw."""

import json
from pathlib import Path
from typing import Any

from personalq.bundle import MANIFEST, file_sha256
from personalq.errors import ParityError
from personalq.goldens import GOLDEN
from personalq.repository import Repository
from personalq.repository.atomic import write_atomic
from personalq.weights.checkpoint import open_weights
from runtime.gate import LEVELS, Options, run_gate
from runtime.gate.request import sources_of

NOTE = "verified.json"


def verified_level(bundle: Path) -> str:
    """The last level that exactly these bytes passed; '' when they were never verified."""
    note = _read(bundle / NOTE)
    level = note.get("level")
    is_this = note.get("manifest_sha256") == file_sha256(bundle / MANIFEST)
    return str(level) if is_this and level in LEVELS else ""


def is_verified(bundle: Path, level: str) -> bool:
    """Whether the bundle passed `level`, or the highest level that it can be held to."""
    reached = verified_level(bundle)
    return bool(reached) and LEVELS.index(reached) >= LEVELS.index(reachable(bundle, level))


def reachable(bundle: Path, level: str) -> str:
    """`level`, or the files alone when the bundle has no goldens: fp16 and fp32 need no calibration, which writes them."""
    return level if (bundle / GOLDEN).is_file() else LEVELS[0]


def verify(repository: Repository, bundle: Path, level: str, threads: int) -> str:
    """Run the gate, note the level that was passed, and return it. Raises ParityError with the report's headline."""
    asked = reachable(bundle, level)
    sources = sources_of(bundle, repository, lambda: open_weights)
    report = run_gate(bundle, Options(threads=threads, level=asked), sources)
    if not report.passed:
        raise ParityError(report.headline)
    note = {"level": asked, "checks": len(report.checks), "manifest_sha256": file_sha256(bundle / MANIFEST)}
    write_atomic(bundle / NOTE, (json.dumps(note, sort_keys=True) + "\n").encode())
    return asked


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
