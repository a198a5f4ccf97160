"""A lock per piece of work: a second process waits, then finds the work done."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows: no lock, so work may be done twice; publishing by rename keeps it whole
    fcntl = None  # type: ignore[assignment]


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the lock for the work that produces `folder`: a file beside it, released by the system if its holder dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f".lock-{folder.name}"
    handle = _locked(file)
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: a waiter sees that the file is gone and creates a new one
            file.unlink()
        os.close(handle)


def _locked(file: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is None:
            return handle
        fcntl.flock(handle, fcntl.LOCK_EX)
        if file.exists() and os.fstat(handle).st_ino == file.stat().st_ino:
            return handle
        os.close(handle)
