"""sha256 of large weight files, recorded beside them: hashing a base's gigabytes for every adapter would take seconds each.

A record holds while the file lies untouched: same inode, size, time of its bytes and time of its entry (ctime). The system
alone sets the last one, so that bytes changed with their time put back, or a copied record, are hashed again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..bundle import HASHED_AT_ONCE, file_sha256
from ..errors import RepositoryError
from .atomic import write_atomic

RECORD = ".digests.json"
SMALLEST = 64 << 20  # bytes; smaller files are hashed sooner than a record is written
_STILL_S = 2.0  # a change within one tick of the file system's clock would not show
_KEEPS = os.name != "nt"  # Windows has the time of creation in place of ctime
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SEEN: dict[tuple[str, tuple[int, ...]], str] = {}

Stamp = tuple[int, ...]


def digests_of(folder: Path, files: Sequence[Path]) -> list[str]:
    """sha256 of each file inside `folder`, in order; those of large files are recorded there, where it can be written."""
    names = [file.relative_to(folder).as_posix() for file in files]
    stamps = [_stamp(file) for file in files]
    known = _read(folder / RECORD) if any(_is_large(stamp) for stamp in stamps) else {}
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        digests = list(pool.map(_digest, files, stamps, map(known.get, names)))
    record = {
        name: (stamp, digest)
        for file, name, stamp, digest in zip(files, names, stamps, digests, strict=True)
        if _is_large(stamp) and (known.get(name) == (stamp, digest) or _is_still(file, stamp))
    }
    if _KEEPS and record != known:
        _write(folder / RECORD, record)
    return digests


def _digest(file: Path, stamp: Stamp, known: tuple[Stamp, str] | None) -> str:
    """The file's sha256: seen by this process, recorded for this stamp, or computed."""
    key = (str(file), stamp)
    if key in _SEEN:
        return _SEEN[key]
    digest = known[1] if known is not None and known[0] == stamp else file_sha256(file)
    if _is_still(file, stamp):
        _SEEN[key] = digest
    return digest


def _stamp(file: Path) -> Stamp:
    stat = file.stat()
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns if _KEEPS else 0)


def _is_large(stamp: Stamp) -> bool:
    return stamp[1] >= SMALLEST


def _is_still(file: Path, stamp: Stamp) -> bool:
    """Whether the file was not touched while it was hashed, nor shortly before."""
    return time.time() - max(stamp[2:]) / 1e9 > _STILL_S and _stamp(file) == stamp


def _read(record: Path) -> dict[str, tuple[Stamp, str]]:
    """What was recorded; nothing where that is not understood."""
    try:
        told = json.loads(record.read_bytes())
        found = {str(name): (tuple(map(int, stamp)), str(digest)) for name, (stamp, digest) in told.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {name: entry for name, entry in found.items() if _SHA256.fullmatch(entry[1])}


def _write(record: Path, told: dict[str, tuple[Stamp, str]]) -> None:
    with contextlib.suppress(RepositoryError):  # a folder that is only read: the next process hashes again
        write_atomic(record, (json.dumps(told, sort_keys=True) + "\n").encode())
