"""What a checkpoint's weights are, as a hash. Paths never enter."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..bundle import HASHED_AT_ONCE, file_sha256

_STILL_S = 2.0
_DIGESTS: dict[tuple[str, int, int, int], str] = {}


def weights_sha256(base_dir: Path, checkpoint_dir: Path | None) -> str:
    """sha256 over the bytes of every weight file of base and delta, by role and name inside its folder."""
    files: dict[str, Path] = {}
    for role, folder in (("base", base_dir), ("delta", checkpoint_dir)):
        if folder is not None:
            found = sorted(folder.rglob("*.safetensors"))
            files |= {f"{role}/{file.relative_to(folder).as_posix()}": file for file in found}
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        digests = pool.map(_file_digest, files.values())
    lines = [f"{name}:{digest}\n" for name, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    """file_sha256, once a process for a file that lay still: a base is hashed for every checkpoint over it."""
    stat = file.stat()
    key = (str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key in _DIGESTS:
        return _DIGESTS[key]
    digest = file_sha256(file)
    if time.time() - stat.st_mtime > _STILL_S:  # a change within one tick of the file system's clock would not show
        _DIGESTS[key] = digest
    return digest
