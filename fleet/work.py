"""What a run sends to its workers and what they return: plain values, serialised as JSON. It knows no torch, pipe or cluster."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from personalq.errors import SpecError

DEFAULT_SPEC = "taq-w8a8"
NOT_VERIFIED = "none"
REFERENCES = ("fp16", "fp32")  # specs that need no calibration
_SPEC_NAME = re.compile(r"[a-z0-9][a-z0-9-]*-w(8|7|6|4)a8")


@dataclass(frozen=True)
class Work:
    """How every checkpoint of a run is exported.

    root: the repository, under the same path on every machine. spec: 'taq-w4a8', 'fp16', ...; '': the one that was
    calibrated last, else taq-w8a8; of the base where checkpoints are attached. form: 'auto', 'attached' or 'merged'.
    verify: the gate's last level, or 'none'. threads: cores of one export. store: URL that every bundle is published to, or ''.
    """

    root: str
    spec: str = ""
    form: str = "auto"
    targets: tuple[str, ...] = ("onnxruntime",)
    settings: tuple[str, ...] = ()
    verify: str = "images"
    threads: int = 2
    store: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Work":
        told = json.loads(text)
        return cls(**{**told, "targets": tuple(told["targets"]), "settings": tuple(told["settings"])})


@dataclass(frozen=True)
class Task:
    """One piece: a checkpoint to export, a base's engine to export, or the family of a checkpoint's base to trace."""

    kind: Literal["family", "base", "checkpoint"]
    id: str


@dataclass(frozen=True)
class Outcome:
    """The outcome of a task. failed: step says where; is_final: trying again would give the same.

    form: 'attached', 'merged' or 'base', and form_reason why. seconds: by step. bytes: of all files of the bundle.
    peak_rss_bytes: of the worker so far, not of this task alone.
    """

    id: str
    state: Literal["done", "reused", "failed"]
    step: str = ""
    reason: str = ""
    is_final: bool = True
    bundle: str = ""
    spec: str = ""
    verified: str = ""
    bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    attempts: int = 1
    form: str = ""
    form_reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """One row of the report."""
        row: dict[str, Any] = {"id": self.id} | ({"form": self.form} if self.form else {})
        if self.state == "failed":
            row |= {"step": self.step, "reason": self.reason}
        else:
            row |= {"form_reason": self.form_reason} if self.form_reason else {}
            row |= {"bundle": self.bundle, "spec": self.spec, "verified": self.verified, "bytes": self.bytes}
        steps = {f"{name}_s": round(value, 2) for name, value in self.seconds.items()}
        return row | {"seconds": round(sum(self.seconds.values()), 2)} | steps | {"attempts": self.attempts}


def spec_name(asked: Path | None) -> str:
    """The spec that --spec names for many checkpoints; '' for none. Raises SpecError for a file or an unknown form."""
    name = "" if asked is None else str(asked)
    if name and name not in REFERENCES and not _SPEC_NAME.fullmatch(name):
        raise SpecError(
            f"--spec: must be fp16, fp32 or POLICY-w8a8, -w7a8, -w6a8 or -w4a8 (such as taq-w4a8) for many checkpoints, "
            f"got {name[:80]!r}; a spec file belongs to one checkpoint"
        )
    return name


def read_ids(file: Path) -> list[str]:
    """Ids of a text file, one a line, each once; empty lines and '#' comments are left out. Raises SpecError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise SpecError(f"{file}: must be UTF-8 text with one id a line, got other bytes; write it again") from None
    ids = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not ids:
        raise SpecError(f"{file}: must name at least one id, one a line, got none; list them with 'personalq ls'")
    return list(dict.fromkeys(ids))
