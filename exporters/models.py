"""Whole models as they lie on disk: which files, and which torch parameter each tensor is. Knows no deltas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from personalq.errors import RepositoryError

from .tensorfile import TensorFile

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae")
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".bf16")
_PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl"})
# What trainers leave beside the weights; not weights.
_TRAINER_FILES = re.compile(r"(optimizer|scheduler|scaler|training_args|random_states|rng_state|sampler).*")
_OLD_VAE = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class Stored:
    """Where a parameter's bytes are: the file, and the name it has there."""

    file: TensorFile
    name: str


@dataclass(frozen=True)
class Model:
    """One model's parameters as they lie on disk."""

    stored: Mapping[str, Stored]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.file.shape(stored.name) for name, stored in self.stored.items()}


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
    stored = {_parameter(component, key): Stored(file, key) for file in files for key in file.names()}
    return Model({name: place for name, place in stored.items() if not name.endswith("position_ids")})


def _weight_paths(folder: Path) -> list[Path]:
    """`<stem>.safetensors`, or the shards its index names; full precision before a variant."""
    for variant in _VARIANTS:
        for stem in _STEMS:
            if (path := folder / f"{stem}{variant}.safetensors").is_file():
                return [path]
            if (index := folder / f"{stem}.safetensors.index{variant}.json").is_file():
                return _shards(index)
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
    if component == "text_encoder_2" and not key.startswith(("text_model.", "text_projection.")):
        return f"text_model.{key}"
    return key


def read_vocabulary(base_dir: Path) -> frozenset[str]:
    """Every entry of the tokenizer, added tokens included; empty when the folder has no tokenizer."""
    folder = base_dir / "tokenizer"
    entries: set[str] = set()
    try:
        if (file := folder / "tokenizer.json").is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            entries |= content["model"]["vocab"].keys()
            entries |= {token["content"] for token in content.get("added_tokens", [])}
        else:
            for name in ("vocab.json", "added_tokens.json"):
                if (file := folder / name).is_file():
                    entries |= json.loads(file.read_text(encoding="utf-8")).keys()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RepositoryError(f"{file}: must be a tokenizer file, got {str(error)[:60]}; add the base again") from error
    return frozenset(entries)


def refuse_pickles(folder: Path) -> None:
    """Raise when weights lie here only as a pickle: leaving them out would give another model than its author's."""
    paths = [folder] if folder.is_file() else sorted(folder.glob("*")) if folder.is_dir() else []
    for path in paths:
        is_pickle = path.suffix in _PICKLES and not _TRAINER_FILES.fullmatch(path.name)
        if is_pickle and not path.with_suffix(".safetensors").exists():
            script = f"s.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')"
            raise RepositoryError(
                f"{path}: must be safetensors, got a pickle, which can run code when opened; convert it where you "
                f'trust it: python -c "import torch, safetensors.torch as s; {script}"'
            )
