"""Equal files of several bundles as one on disk: hard links between bundles, found by their sha256.

A base's VAE decoder and text encoder are the same in every LoRA's bundle. `<repository>/shared/<sha256>` is a note that
says which bundle has a file of these bytes; the file itself is the bundle's own and goes with the last bundle that links
to it, so nothing has to be counted or collected but notes that lead nowhere.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from .atomic import is_temporary, temporary_beside, write_atomic

NOTES = "shared"
SMALLEST = 1 << 16  # bytes; smaller files are not worth a link


def link_shared(root: Path, folder: Path, sha256: Mapping[str, str]) -> int:
    """Replace files of `folder` (name -> sha256) by links to equal files of other bundles. Returns the bytes saved."""
    saved = 0
    for name, digest in sha256.items():
        file, other = folder / name, _noted(root, digest)
        size = file.stat().st_size
        if other is None or size < SMALLEST or not filecmp.cmp(file, other, shallow=False):
            continue  # a file whose bytes were spoiled meanwhile is not handed on
        try:
            _replace(other, file)
            saved += size
        except OSError:  # another file system, no hard links, too many of them: the file stays as it is
            continue
    return saved


def note_shared(root: Path, bundle: Path, sha256: Mapping[str, str]) -> None:
    """Note where a published bundle's files are, for the next one that has the same bytes."""
    for name, digest in sha256.items():
        file, other = bundle / name, _noted(root, digest)
        if file.stat().st_size >= SMALLEST and (other is None or not other.samefile(file)):
            write_atomic(root / NOTES / digest, f"{bundle.name}/{name}\n".encode())


def shared_file(root: Path, digest: str) -> Path | None:
    """A file of some bundle that was noted under this sha256; its bytes may have been spoiled since."""
    return _noted(root, digest)


def dangling(root: Path) -> Iterator[Path]:
    """Every note whose bundle is gone."""
    place = root / NOTES
    for note in sorted(place.iterdir()) if place.is_dir() else ():
        if not is_temporary(note) and _noted(root, note.name) is None:
            yield note


def forget_dangling(root: Path) -> None:
    """Remove the notes that lead nowhere."""
    for note in list(dangling(root)):
        note.unlink(missing_ok=True)


def _noted(root: Path, digest: str) -> Path | None:
    """The file a note leads to, inside the repository's bundles; None when there is none."""
    try:
        bundle, _, name = (root / NOTES / digest).read_text().strip().partition("/")
    except (OSError, ValueError):
        return None
    file = root / "bundles" / bundle / name
    is_plain = bundle not in ("", ".", "..") and Path(name).name == name
    return file if is_plain and file.is_file() and not file.is_symlink() else None


def _replace(source: Path, place: Path) -> None:
    temporary = temporary_beside(place)
    try:
        os.link(source, temporary)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
