"""What somebody names to `add`: one checkpoint, or a folder of many. Looks at names and headers, opens no weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import RepositoryError
from ..weights.deltas.embeddings import PIVOTAL
from ..weights.deltas.kinds import file_kind
from ..weights.header import Header, read_header
from ..weights.models import COMPONENTS
from ..weights.pickles import PICKLES, lone_pickles

_STATE = re.compile(r"checkpoint-\d+")  # what trainers write on the way
_ONE = ("model_index.json", "card.json")
_HEADS = ("lora", "original", "custom_diffusion")
_FEW_TOKENS = 4  # embeddings that one checkpoint may have without saying that it is one
_SUFFIX = ".safetensors"


def checkpoints_in(path: Path) -> list[Path]:
    """The checkpoints that a file or folder holds, each a file or folder: itself when it is one.

    A folder is many when several of its files are checkpoints of their own (two spellings of one LoRA are one), or when only
    its sub-folders hold weights. Files that are refused later are among them, so that each is reported.
    """
    if not path.is_dir() or _is_one(path):
        return [path]
    weights = sorted(file for file in path.iterdir() if file.is_file() and file.suffix == _SUFFIX)
    pickles = lone_pickles(sorted(file for file in path.iterdir() if file.is_file()))
    headers = {file: header for file in weights if (header := _header(file)) is not None}
    parts = [part for folder in sorted(path.iterdir()) if _may_hold(folder) for part in checkpoints_in(folder)]
    loose = len(weights) + len(pickles)
    if loose == 0:
        return parts or [path]
    distinct = _without_twins(weights, headers)
    is_readable = len(headers) == len(weights) and not pickles
    if is_readable and not parts and _is_together(path, {file: headers[file] for file in distinct}):
        return [path]
    if loose == 1 and not parts:
        return [path]
    beside = {emb for file in weights for emb in embedding_beside(file)}
    return sorted([*(file for file in distinct if file not in beside), *pickles]) + parts


def training_states(path: Path) -> list[str]:
    """The folders of training state beside a checkpoint's weights, which are left out."""
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir() and _STATE.fullmatch(folder.name))


def twins_in(path: Path) -> list[Path]:
    """The loose files of a folder that hold another one's LoRA in another spelling."""
    weights = sorted(file for file in path.glob(f"*{_SUFFIX}") if file.is_file())
    headers = {file: header for file in weights if (header := _header(file)) is not None}
    return sorted(set(weights) - set(_without_twins(weights, headers)))


def embedding_beside(file: Path) -> list[Path]:
    """The embedding that pivotal tuning saved beside a LoRA."""
    beside = file.with_name(f"{file.stem}{PIVOTAL}{_SUFFIX}")
    return [beside] if beside.is_file() else []


def needed_pickles(folder: Path, files: Sequence[Path]) -> list[Path]:
    """The pickles in a checkpoint's folder that hold weights which nothing else there holds."""
    # beside a pipeline's folders a pickle is the same pipeline as one file
    is_pipeline = (folder / "model_index.json").is_file()
    return [file for file in lone_pickles(files) if file.parent != folder or not is_pipeline]


def _is_one(path: Path) -> bool:
    """A folder that says it is one checkpoint, or that has a model's folders."""
    return any((path / name).is_file() for name in _ONE) or any(
        next((path / component).glob(f"*{_SUFFIX}"), None) for component in COMPONENTS if (path / component).is_dir()
    )


def _may_hold(folder: Path) -> bool:
    """A sub-folder with weights that is neither hidden, nor training state, nor a link out of its place."""
    if not folder.is_dir() or folder.is_symlink() or folder.name.startswith(".") or _STATE.fullmatch(folder.name):
        return False
    return any(next(folder.rglob(f"*{suffix}"), None) for suffix in (_SUFFIX, *sorted(PICKLES)))


def _header(file: Path) -> Header | None:
    try:
        return read_header(file)
    except RepositoryError:
        return None  # refused, with the reason, when it is added


def _is_together(path: Path, headers: Mapping[Path, Header]) -> bool:
    """Whether loose files without twins are one checkpoint: one LoRA, model or delta and its embeddings, or a few embeddings."""
    kinds = {file: file_kind(header.shapes) for file, header in headers.items()}
    heads = [file for file, kind in kinds.items() if kind in _HEADS]
    tokens = [file for file, kind in kinds.items() if kind == "textual_inversion"]
    if len(heads) + len(tokens) < len(headers):
        return len(headers) == 1
    if heads:
        return len(heads) == 1 and len(tokens) <= _FEW_TOKENS
    is_said = (path / "README.md").is_file() or any(file.stem.startswith("learned_embeds") for file in tokens)
    return len(tokens) == 1 or (is_said and len(tokens) <= _FEW_TOKENS)


def _without_twins(files: list[Path], headers: Mapping[Path, Header]) -> list[Path]:
    """The files without those that hold another's matrices under other names: trainers write a LoRA in two spellings."""
    if len(files) < 2:  # a lone file has no twin, and may be large to hash
        return files
    kept: dict[object, Path] = {}
    for file in sorted(files, key=lambda file: (not file.name.startswith("pytorch_lora_weights"), file.name)):
        kept.setdefault(_fingerprint(file, headers.get(file)), file)
    return sorted(kept.values())


def _fingerprint(file: Path, header: Header | None) -> object:
    """Equal for two files of one LoRA: the hashes of its matrices, whatever they are called."""
    if header is None or file_kind(header.shapes) != "lora":
        return file
    digests = []
    with file.open("rb") as opened:
        for entry in header.entries.values():
            if len(entry.shape) > 1:
                opened.seek(entry.begin)
                digests.append(hashlib.sha256(opened.read(entry.end - entry.begin)).hexdigest())
    return tuple(sorted(digests))
