"""The adapter bundle's manifest: a checkpoint's delta in run-time form, made for one base's weights and none of its specs.

Beside it lies adapter.safetensors, whose tensors `personalq.weights.adapter` writes and reads.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from .bundle import CheckpointEntry, FileEntry, Frozen, Manifest, check_files, inside, parse_manifest, read_manifest
from .errors import BundleError

ADAPTER = "adapter.safetensors"


class Learned(Frozen):
    """A token that the checkpoint adds, and the pieces that stand for it: one vector of every text encoder each."""

    token: str
    pieces: tuple[str, ...]


class Correction(Frozen):
    """A low-rank part that makes up for the rounding of one base's spec: it is used with that spec's engine alone."""

    spec_sha256: str
    rank: int


class AdapterManifest(Frozen):
    """What an adapter holds, and what it may be attached to: any base of its family; it was made for `base_sha256`.

    scheduler, steps, guidance: how the checkpoint is drawn. rank: the largest of its layers. errors: component.layer -> the
    share of the change that the matrices lack, 0..1 (of its root mean square); layers not named are exact up to float16.
    left_out: what of the delta has no place in an adapter, in words.
    """

    schema_version: Literal[1] = 1
    kind: Literal["adapter"] = "adapter"
    key: str
    key_parts: dict[str, str]
    checkpoint: CheckpointEntry
    base_sha256: str
    family: str
    exporter_version: str
    scheduler: dict[str, Any]
    sources: dict[str, str] = Field({}, description="where scheduler and tokens come from")
    steps: int = 25
    guidance: float = 7.5
    learned: tuple[Learned, ...] = ()
    rank: int = 0
    errors: dict[str, float] = Field({}, description="see above")
    left_out: tuple[str, ...] = ()
    correction: Correction | None = None
    bytes: int = Field(0, description="of adapter.safetensors")
    files: dict[str, FileEntry] = Field({}, description="name -> hash and size")

    @property
    def expansions(self) -> dict[str, str]:
        """A multi-vector trigger '<tok>' -> '<tok> <tok>_1', as bundle.Text has it."""
        return {one.token: " ".join(one.pieces) for one in self.learned if len(one.pieces) > 1}


def is_adapter(bundle: Path) -> bool:
    """Tell whether a bundle's folder holds an adapter."""
    return (bundle / ADAPTER).is_file()


def read_adapter_manifest(bundle: Path) -> AdapterManifest:
    """Read and validate an adapter's manifest. Raises BundleError naming the field."""
    manifest = parse_manifest(bundle, AdapterManifest, "an adapter's folder")
    for name in manifest.files:
        inside(bundle, name)
    return manifest


def read_any(bundle: Path) -> Manifest | AdapterManifest:
    """The manifest of an adapter or of an engine. Raises BundleError."""
    return read_adapter_manifest(bundle) if is_adapter(bundle) else read_manifest(bundle)


def is_intact(bundle: Path) -> bool:
    """True when a finished bundle is there, byte for byte."""
    try:
        return not check_files(bundle, read_any(bundle))
    except BundleError:
        return False


def parse_any(data: bytes) -> Manifest | AdapterManifest:
    """The manifest of an adapter or of an engine, from its JSON. Raises pydantic's ValidationError."""
    try:
        kind = json.loads(data)["kind"]
    except (ValueError, KeyError, TypeError):
        kind = ""
    return (AdapterManifest if kind == "adapter" else Manifest).model_validate_json(data)
