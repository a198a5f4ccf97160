"""Putting a checkpoint's files into its folder: copied as they are, a one-file checkpoint unpacked. Returns what was written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cards.importers import Source
from ..errors import RepositoryError
from ..weights.checkpoint import shapes_of
from ..weights.models import read_models
from ..weights.one_file.original import is_original, read_original, unpack
from ..weights.tensorfile import TensorFile
from . import audit

Record = dict[str, dict[str, Any]]


def place_files(read: Source, base: Path | None, place: Path) -> Record:
    """Copy a checkpoint's files into ``place``, a one-file checkpoint as the folders its base has; return their record.

    Raises RepositoryError for a one-file checkpoint without a base here, or of another architecture.
    """
    files = {name: file for name, file in read.files if name != "card.json"}
    single = next((name for name, header in read.headers.items() if is_original(header.shapes)), "")
    record = copy_files([(name, file) for name, file in files.items() if name != single], place)
    if single:
        if base is None or not (base / "unet").is_dir():
            raise RepositoryError(
                f"{single}: one-file checkpoints need their base in this repository, got {read.card.base!r}; "
                "add it, then name it with --base"
            )
        models = read_original(TensorFile(files[single]), shapes_of(read_models(base)))
        record |= {name: _entry(place / name) for name in unpack(models, place)}
    return record


def copy_files(files: Sequence[tuple[str, Path]], place: Path) -> Record:
    """Copy files into ``place``; return {name: {sha256, bytes}} of what was copied."""
    record = {}
    for name, file in files:
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        record[name] = _entry(target)
    return record


def _entry(file: Path) -> dict[str, Any]:
    return {"sha256": audit.sha256(file), "bytes": file.stat().st_size}
