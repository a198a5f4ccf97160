"""Pickles run code when they are opened, so none is opened here: they are told by their bytes and refused with what to do."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from ..errors import RepositoryError

PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"})
# What trainers leave beside the weights; not weights.
_TRAINER_FILES = re.compile(r"(optimizer|scheduler|scaler|training_args|random_states|rng_state|sampler).*")
_UNUSED = frozenset({"safety_checker", "feature_extractor"})  # parts of a pipeline that no picture needs
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_VARIANT = re.compile(r"\.(?:fp16|bf16|fp32|non_ema)\Z")
_CONTENTS = {
    "safetensors": "safetensors",
    "zip": "a zip archive, as torch saves pickles",
    "pickle": "a pickle",
    "lfs": "a Git LFS pointer and not the weights",
    "html": "a web page",
    "": "a file that is neither safetensors nor a pickle",
}


def content_of(path: Path) -> str:
    """What a file is by its first bytes: a key of _CONTENTS, '' for what is none of them. Raises RepositoryError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise RepositoryError(f"{path}: must be a readable file, got '{error.strerror}'; check the path") from error
    # A header's length may begin with a pickle's first byte, so this comes first.
    if start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return "pickle"
    if start.startswith(b"version https://git-lfs"):
        return "lfs"
    return "html" if start.lstrip().lower().startswith((b"<!doctype html", b"<html")) else ""


def is_trainer_file(path: Path) -> bool:
    """Tell whether a file is what trainers leave beside the weights."""
    return _TRAINER_FILES.fullmatch(path.name) is not None


def refuse_pickles(folder: Path) -> None:
    """Raise when weights lie here only as a pickle: leaving them out would give another model than its author's."""
    paths = [folder] if folder.is_file() else sorted(folder.glob("*")) if folder.is_dir() else []
    if lone := lone_pickles(paths):
        raise pickle_refusal(*lone)


def lone_pickles(paths: Iterable[Path]) -> list[Path]:
    """The pickles among the files of a checkpoint that hold weights which no safetensors file beside them holds."""
    files = list(paths)
    safe = {(path.parent, _stem(path)) for path in files if path.suffix == ".safetensors"}
    return [path for path in files if _is_pickled_weights(path) and (path.parent, _stem(path)) not in safe]


def safe_name(path: Path) -> str:
    """The name that a pickle's weights have as safetensors, as transformers and diffusers name them."""
    stem = re.sub(r"\Apytorch_model(?=\Z|[.-])", "model", path.stem)
    return f"{stem}.safetensors"


def pickle_refusal(*paths: Path) -> RepositoryError:
    """The refusal of one checkpoint's pickles, said by what the first of them is."""
    path, content = paths[0], content_of(paths[0]) if paths[0].is_file() else "pickle"
    if content not in ("pickle", "zip"):
        return _mismatch(path, content)
    command = f"personalq convert {' '.join(shlex.quote(str(one)) for one in paths)}"
    return RepositoryError(
        f"{path}: must be safetensors, got a pickle, which can run code when opened; convert it, which loads its weights "
        f"and nothing else: {command}"
    )


def misnamed(path: Path) -> RepositoryError | None:
    """The refusal of a '.safetensors' file that is something else by its bytes; None when it may be a damaged one."""
    content = content_of(path)
    return _mismatch(path, content) if content not in ("", "safetensors") else None


def _mismatch(path: Path, content: str) -> RepositoryError:
    """The refusal of a file whose name does not fit its content."""
    got, cure = _CONTENTS[content], "fetch it again"
    if content == "safetensors":
        got, cure = f"safetensors named {path.suffix}", f"rename it: {_move(path, path.with_suffix('.safetensors'))}"
    elif content in ("zip", "pickle"):
        other = path.with_suffix(".ckpt")
        cure = f"rename and convert it: {_move(path, other)} && personalq convert {shlex.quote(str(other))}"
    elif content == "lfs":
        cure = "fetch them with 'git lfs pull'"
    return RepositoryError(f"{path}: must be safetensors by name and content, got {got}; {cure}")


def _move(old: Path, new: Path) -> str:
    return f"mv {shlex.quote(str(old))} {shlex.quote(str(new))}"


def _is_pickled_weights(path: Path) -> bool:
    return path.suffix in PICKLES and not is_trainer_file(path) and path.parent.name not in _UNUSED


def _stem(path: Path) -> str:
    """A file's name without what may differ between a pickle and the safetensors that holds the same weights."""
    return _VARIANT.sub("", _SHARD.sub("", Path(safe_name(path)).stem))
