"""Whole models as they lie on disk: which files, and which torch parameter each tensor is. Knows no deltas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import RepositoryError
from .pickles import refuse_pickles
from .tensorfile import Array, TensorFile

SECOND_ENCODER = "text_encoder_2"
REQUIRED = ("unet", "text_encoder", "vae")
COMPONENTS = ("unet", "text_encoder", SECOND_ENCODER, "vae")
TOKEN_EMBEDDING = "embeddings.token_embedding.weight"  # of a text encoder
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}  # a text encoder's is 'model'
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".bf16", ".non_ema")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "added_tokens.json")
_OLD_VAE = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class Stored:
    """Where a parameter's bytes are: the file, the name it has there, and its own shape.

    third: of a fused projection's rows, which third it is (None: it is the whole tensor). is_transposed: the file has it
    as (in, out).
    """

    file: TensorFile
    name: str
    shape: tuple[int, ...]
    third: int | None = None
    is_transposed: bool = False

    def read(self) -> Array:
        """The parameter in the file's dtype (BF16: float32), a view of the map where it can be one."""
        return self._part(self.file.read(self.name))

    def bits(self) -> Array:
        """The parameter's own bits: as `read`, but BF16 stays as it is (uint16)."""
        return self._part(self.file.bits(self.name))

    def n_bytes(self) -> int:
        """How many bytes the parameter has in the file."""
        entry = self.file.entries[self.name]
        return (entry.end - entry.begin) // (1 if self.third is None else 3)

    def _part(self, array: Array) -> Array:
        if self.third is not None:
            rows = len(array) // 3
            array = array[self.third * rows : (self.third + 1) * rows]
        return (array.T if self.is_transposed else array).reshape(self.shape)


@dataclass(frozen=True)
class Model:
    """One model's parameters as they lie on disk."""

    stored: Mapping[str, Stored]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.stored.items()}


def is_model(name: str) -> bool:
    """Tell whether a file's place in its folder ('unet/diffusion_pytorch_model.safetensors') is that of a model's weights."""
    component, _, file = name.rpartition("/")
    return component in COMPONENTS and file.startswith(_STEMS)


def read_models(folder: Path) -> dict[str, Model]:
    """Every model of COMPONENTS that has weights in its sub-folder."""
    return {name: model for name in COMPONENTS if (model := _read_model(folder / name, name))}


def _read_model(folder: Path, component: str) -> Model | None:
    """The model in a diffusers sub-folder; None when it has no weights at all, an error when they are pickles."""
    paths = _weight_paths(folder)
    if not paths:
        refuse_pickles(folder)
        return None
    files = [TensorFile(path) for path in paths]
    stored = {
        _parameter(component, key): Stored(file, key, shape) for file in files for key, shape in file.shapes.items()
    }
    return Model({name: place for name, place in stored.items() if not name.endswith("position_ids")})


def _weight_paths(folder: Path) -> list[Path]:
    """`<stem>.safetensors`, or the shards its index names; full precision before a variant."""
    for variant in _VARIANTS:
        for stem in _STEMS:
            if (path := folder / f"{stem}{variant}.safetensors").is_file():
                return [path]
            for index in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
                if (path := folder / index).is_file():
                    return _shards(path)
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [index.parent / Path(name).name for name in names]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RepositoryError(f"{index}: must be a safetensors index, got {str(error)[:60]}; copy it again") from error
    for path in paths:
        if not path.is_file():
            raise RepositoryError(f"{path}: must be there because {index.name} names it, got nothing; copy it again")
    return paths


def _parameter(component: str, key: str) -> str:
    """The torch parameter's name for a name in a file."""
    if component == "vae":
        if "attentions" in key:
            for old, new in _OLD_VAE.items():
                key = key.replace(old, new)
        return key
    if component == "text_encoder":
        return key.removeprefix("text_model.")
    if component == SECOND_ENCODER and not key.startswith(("text_model.", "text_projection.")):
        return f"text_model.{key}"
    return key


def read_vocabulary(base_dir: Path) -> frozenset[str]:
    """Every entry of the tokenizer, added tokens included; empty when the folder has no tokenizer."""
    folder = base_dir / "tokenizer"
    files = [file for name in _TOKENIZER_FILES if (file := folder / name).is_file()]
    stats = [file.stat() for file in files]
    return _vocabulary(folder, tuple((one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in stats))


@lru_cache(maxsize=4)
def _vocabulary(folder: Path, stamps: tuple[tuple[int, ...], ...]) -> frozenset[str]:
    """The entries, kept: CLIP's take 50 ms to read, and a checkpoint's files are opened several times in a row."""
    return frozenset(read_token_ids(folder)) if stamps else frozenset()


def read_token_ids(folder: Path, name: str = "tokenizer.json") -> dict[str, int]:
    """token -> id of a tokenizer's folder, added tokens included; empty when it has no tokenizer. name: of its one file."""
    ids: dict[str, int] = {}
    try:
        if (file := folder / name).is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            ids |= content["model"]["vocab"]
            ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        else:
            for part in ("vocab.json", "added_tokens.json"):
                if (file := folder / part).is_file():
                    ids |= json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RepositoryError(f"{file}: must be a tokenizer file, got {str(error)[:60]}; add the base again") from error
    return ids


def read_special_tokens(folder: Path) -> dict[str, str]:
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= json.loads((folder / name).read_text())

    def text(key: str, default: str) -> str:
        value = config.get(key) or default
        return str(value["content"] if isinstance(value, dict) else value)

    end = text("eos_token", "<|endoftext|>")
    return {"bos": text("bos_token", "<|startoftext|>"), "eos": end, "pad": text("pad_token", end)}
