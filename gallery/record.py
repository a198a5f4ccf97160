"""Where things lie in the gallery, and the log of what every training stage cost (training.json)."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE / "repository"
BASE = REPOSITORY / "bases" / "toyworld"
CHECKPOINTS = REPOSITORY / "checkpoints"
JUDGES = HERE / "judges"
WORK = HERE / ".work"


def record_stage(stage: str, facts: dict[str, object], path: Path = HERE / "training.json") -> None:
    """Set one stage's facts in training.json."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two personalisations may end together
        _record(stage, facts, path)


def _record(stage: str, facts: dict[str, object], path: Path) -> None:
    import torch

    log = json.loads(path.read_text()) if path.exists() else {}
    log["machine"] = "2-core x86-64 CPU" if not torch.cuda.is_available() else torch.cuda.get_device_name(0)
    log["torch"] = torch.__version__
    log.setdefault("stages", {})[stage] = facts
    write_text(path, json.dumps(log, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside the target and rename into place."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def readable(folder: Path) -> None:
    """Give every file below the mode 644 (safetensors writes 600)."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
