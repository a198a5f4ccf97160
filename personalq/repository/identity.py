"""What a checkpoint's weights are, as a hash. Paths never enter."""

import hashlib
from pathlib import Path

from .digests import digests_of


def weights_sha256(base_dir: Path, checkpoint_dir: Path | None) -> str:
    """sha256 over the bytes of every weight file of base and delta, by role and name inside its folder."""
    return _sha256([*_lines("base", base_dir), *([] if checkpoint_dir is None else _lines("delta", checkpoint_dir))])


def delta_sha256(checkpoint_dir: Path) -> str:
    """sha256 over the bytes of a checkpoint's own weight files, by name inside its folder: the same over any base."""
    return _sha256(_lines("delta", checkpoint_dir))


def _lines(role: str, folder: Path) -> list[str]:
    files = sorted(folder.rglob("*.safetensors"))
    names = (f"{role}/{file.relative_to(folder).as_posix()}" for file in files)
    return [f"{name}:{digest}\n" for name, digest in zip(names, digests_of(folder, files), strict=True)]


def _sha256(lines: list[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()
