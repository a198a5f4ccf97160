"""Publish files and folders whole or not at all: write beside the place, flush, rename into it.

A killed process leaves at most a ``.tmp-<pid>-<random>`` entry beside the place, which ``Repository.check`` reports.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import RepositoryError

PREFIX = ".tmp-"
_STALE_SECONDS = 24 * 3600


def temporary_beside(path: Path) -> Path:
    """Return an unused temporary path in the folder of ``path``; its name says which process owns it."""
    return path.parent / f"{PREFIX}{os.getpid()}-{secrets.token_hex(6)}"


def is_temporary(path: Path) -> bool:
    """Tell whether a path is one that ``temporary_beside`` makes."""
    return path.name.startswith(PREFIX)


def is_orphan(path: Path) -> bool:
    """Tell whether the process that was writing a temporary path is gone (or has been silent for a day)."""
    owner = path.name.removeprefix(PREFIX).split("-")[0]
    if not owner.isdigit() or time.time() - path.lstat().st_mtime > _STALE_SECONDS:
        return True
    try:
        os.kill(int(owner), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that readers see the old file or the whole new one.

    Raises RepositoryError when the folder cannot be written.
    """
    temporary = temporary_beside(path)
    try:
        with named_failure(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        with named_failure(path):
            os.replace(temporary, path)
            _fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; rename it to ``path`` on success, remove it on any failure.

    With ``replace`` an existing ``path`` is swapped out; without, an existing ``path`` is a RepositoryError: published
    folders are immutable.
    """
    temporary = temporary_beside(path)
    with named_failure(path):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        _fsync_tree(temporary)
        _publish_folder(temporary, path, replace=replace)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _publish_folder(temporary: Path, path: Path, *, replace: bool) -> None:
    old = temporary_beside(path)
    with named_failure(path):
        if path.exists():
            if not replace:
                raise RepositoryError(f"{path}: must not exist yet, got a published folder; remove it first")
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        _fsync_folder(path.parent)
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for directory, _, names in os.walk(folder):
        for name in names:
            file = Path(directory) / name
            if not file.is_symlink():
                settle(file)
        _fsync_folder(Path(directory))


def settle(file: Path) -> None:
    """Wait until a file's bytes are on disk. Raises OSError when they cannot be."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def named_failure(path: Path) -> Iterator[None]:
    """Turn an operating-system failure into one line that names the place."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RepositoryError(f"{path}: must be writable, got '{reason}'; check permissions and free space") from error
