"""Which bundles passed the gate, and up to which level: a note beside the manifest, so that a second run need not draw."""

import json
from pathlib import Path
from typing import Any

from personalq.adapters import is_adapter, read_adapter_manifest
from personalq.bundle import MANIFEST, file_sha256
from personalq.cards.card import folder_name
from personalq.errors import ParityError
from personalq.goldens import GOLDEN
from personalq.repository import Repository
from personalq.repository.atomic import write_atomic
from personalq.spec import REFERENCE
from personalq.weights.checkpoint import open_weights
from runtime.gate import LEVELS, Options, run_gate
from runtime.gate.check import Report
from runtime.gate.request import Request, answer, sources_of

NOTE = "verified.json"


def verified_level(bundle: Path, engine: Path | None = None) -> str:
    """The last level that exactly these bytes passed; '' when they were never verified. engine: an adapter is attached to."""
    note = _read(bundle / NOTE)
    level, is_this = note.get("level"), {name: note.get(name) for name in _what(bundle, engine)}
    return str(level) if is_this == _what(bundle, engine) and level in LEVELS else ""


def is_verified(bundle: Path, level: str, engine: Path | None = None) -> bool:
    """Whether the bundle passed `level`, or the highest level that it can be held to."""
    reached = verified_level(bundle, engine)
    return bool(reached) and LEVELS.index(reached) >= LEVELS.index(reachable(bundle, level))


def reachable(bundle: Path, level: str) -> str:
    """`level`, or the files alone without goldens: they come from calibration, which fp16, fp32 and adapters do not need."""
    goldens = bundle / GOLDEN
    if is_adapter(bundle):
        owner = read_adapter_manifest(bundle).checkpoint.id
        goldens = bundle.parents[1] / "specs" / folder_name(owner) / REFERENCE
    return level if goldens.is_file() else LEVELS[0]


def verify(repository: Repository, bundle: Path, level: str, threads: int) -> str:
    """Run the gate, note the level that was passed, and return it. Raises ParityError with the report's headline."""
    asked = reachable(bundle, level)
    sources = sources_of(bundle, repository, lambda: open_weights)
    return _noted(run_gate(bundle, Options(threads=threads, level=asked), sources), bundle, None, asked)


def verify_attached(
    repository: Repository, checkpoint_id: str, bundle: Path, engine: Path | None, level: str, threads: int
) -> str:
    """The same of a checkpoint's adapter on its base's engine: what the note is about. None: the gate says what is missing."""
    asked = reachable(bundle, level)
    if engine is None:
        request = Request(str(bundle), level=asked, threads=threads)
        return _noted(answer(request, lambda: repository, lambda: open_weights).report, bundle, engine, asked)
    sources = sources_of(engine, repository, lambda: open_weights, adapter=bundle)
    return _noted(run_gate(engine, Options(threads=threads, level=asked), sources, bundle), bundle, engine, asked)


def _noted(report: Report, bundle: Path, engine: Path | None, level: str) -> str:
    if not report.passed:
        raise ParityError(report.headline)
    note = {"level": level, "checks": len(report.checks), **_what(bundle, engine)}
    write_atomic(bundle / NOTE, (json.dumps(note, sort_keys=True) + "\n").encode())
    return level


def _what(bundle: Path, engine: Path | None) -> dict[str, str]:
    """Exactly which bytes a note is about."""
    own = {"manifest_sha256": file_sha256(bundle / MANIFEST)}
    return own | ({"engine_sha256": file_sha256(engine / MANIFEST)} if engine is not None else {})


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
