"""One process at a time for one piece of work: a second one waits, then finds the work done."""

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
    """Hold the lock of the work that ends in `folder`: a file beside it, let go by the system when its holder dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f".lock-{folder.name}"
    handle = _locked(file)
    try:
        yield
    finally:
        with suppress(OSError):  # while it is held: whoever waits on it sees that it is gone and takes a new one
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
