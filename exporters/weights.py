"""A checkpoint's weights by torch parameter name, tensor by tensor, with its delta merged. numpy only, memory-mapped.

`open_weights` reads headers and refuses what does not fit; a tensor's bytes are touched when it is read. Names are
those of diffusers 0.42 / transformers 5 modules, whichever spelling the file has: text_encoder (CLIPTextModel) without
the `text_model.` prefix, text_encoder_2 (CLIPTextModelWithProjection) with it, a VAE's attention as `to_q`, not `query`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from personalq.bundle import file_sha256
from personalq.errors import RepositoryError

from .deltas import TOKEN_EMBEDDING, Delta, Edit, custom_diffusion_edits, embedding_edits, file_kind, lora_edits
from .tensorfile import Array, TensorFile

COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae")
_REQUIRED = ("unet", "text_encoder", "vae")
_STEMS = ("diffusion_pytorch_model", "model")
_VARIANTS = ("", ".fp16", ".bf16")
_PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl"})
# What trainers leave beside the weights; not weights.
_TRAINER_FILES = re.compile(r"(optimizer|scheduler|scaler|training_args|random_states|rng_state|sampler).*")
_OLD_VAE = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_ANOTHER_BASE = "it was made for another base; add it with --base of the model it was trained on"


@dataclass(frozen=True)
class Stored:
    """Where a parameter's bytes are: the file, and the name it has there."""

    file: TensorFile
    name: str


class ComponentWeights:
    """One model's parameters. `changed` names those the delta touched (a full fine-tune touches all it brings)."""

    def __init__(self, stored: Mapping[str, Stored], edits: Mapping[str, Edit], changed: frozenset[str]):
        self._stored = stored
        self._edits = edits
        self.changed = changed

    def names(self) -> tuple[str, ...]:
        """Every parameter's name, sorted."""
        return tuple(sorted(self._stored))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape `read` will give. Raises RepositoryError for a name the model does not have."""
        stored = self._find(name)
        base = stored.file.shape(stored.name)
        return self._edits[name].shape(base) if name in self._edits else base

    def read(self, name: str) -> Array:
        """The merged tensor: float32 where a delta edits it or the file has BF16, else a read-only view of the file."""
        stored = self._find(name)
        base = stored.file.read(stored.name)
        return self._edits[name].apply(base) if name in self._edits else base

    def _find(self, name: str) -> Stored:
        if name not in self._stored:
            raise RepositoryError(
                f"{name}: must be a parameter of the checkpoint, got none of this name; add the checkpoint again"
            )
        return self._stored[name]


@dataclass(frozen=True)
class CheckpointWeights:
    """All models of a checkpoint.

    added_tokens: (token, its pieces) for each learned embedding; piece i of all of them, in order, has the id
    first_added_id + i and row first_added_id + i of the text encoder's token embedding.
    files: (role, path) of every file that is read, in the order of the hash.
    """

    components: Mapping[str, ComponentWeights]
    added_tokens: tuple[tuple[str, tuple[str, ...]], ...]
    first_added_id: int
    files: tuple[tuple[str, Path], ...]

    def component(self, name: str) -> ComponentWeights:
        """One of COMPONENTS. Raises RepositoryError when the checkpoint has no such model."""
        if name not in self.components:
            raise RepositoryError(
                f"{name}: must be one of {', '.join(self.components)}, got a model this checkpoint does not have"
            )
        return self.components[name]

    def sha256(self) -> str:
        """Hash of every weight file's bytes, base and delta, in the order of their roles. Folders do not enter it."""
        digest = hashlib.sha256()
        for role, path in self.files:
            stat = path.stat()
            digest.update(f"{role}/{path.name}:{_hashed(path, stat.st_size, stat.st_mtime_ns)}\n".encode())
        return digest.hexdigest()


@lru_cache(maxsize=1024)
def _hashed(path: Path, size: int, mtime_ns: int) -> str:
    """A file's sha256, remembered by this process while size and time stay the same."""
    return file_sha256(path)


def open_weights(base_dir: Path, checkpoint_dir: Path | None, kind: str) -> CheckpointWeights:
    """Open a base pipeline folder with one checkpoint's delta over it; no delta for `checkpoint_dir` None.

    kind: 'dreambooth' (folders of whole models; what is missing comes from the base), 'lora', 'textual_inversion' or
    'custom_diffusion' (safetensors files in `checkpoint_dir`, told apart by what is in them).
    Raises RepositoryError in one line: missing, truncated or pickled files, names or shapes that do not fit the base.
    """
    base = _models(base_dir, "base")
    if checkpoint_dir is None:
        return _checkpoint(base_dir, base, {}, base_dir, Delta(), [])
    if not checkpoint_dir.exists():
        raise RepositoryError(
            f"{checkpoint_dir}: must hold the checkpoint's weights, got nothing; run 'personalq add' again"
        )
    _refuse_pickles(checkpoint_dir)
    if kind == "dreambooth":
        whole = _models(checkpoint_dir, "checkpoint")
        _check_whole(checkpoint_dir, base, whole)
        return _checkpoint(base_dir, base, whole, checkpoint_dir, Delta(), [])
    files = _delta_files(checkpoint_dir, kind)
    _check_required(base_dir, base)
    delta = _delta(files, base, _vocabulary(base_dir))
    return _checkpoint(base_dir, base, {}, base_dir, delta, files)


@dataclass(frozen=True)
class _Model:
    """One model's files as they lie on disk."""

    role: str
    files: tuple[TensorFile, ...]
    stored: Mapping[str, Stored]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.file.shape(stored.name) for name, stored in self.stored.items()}


def _checkpoint(
    base_dir: Path,
    base: Mapping[str, _Model],
    whole: Mapping[str, _Model],
    tokenizer_dir: Path,
    delta: Delta,
    delta_files: Sequence[TensorFile],
) -> CheckpointWeights:
    models = {**base, **whole}
    _check_required(base_dir, models)
    components = {
        name: ComponentWeights(
            models[name].stored,
            delta.edits.get(name, {}),
            frozenset(whole[name].stored if name in whole else delta.edits.get(name, {})),
        )
        for name in COMPONENTS
        if name in models
    }
    files = [(f"{models[name].role}.{name}", file.path) for name in components for file in models[name].files]
    files += [(f"delta.{file_kind(file)}", file.path) for file in delta_files]
    rows = models["text_encoder"].shapes().get(TOKEN_EMBEDDING, (0,))[0]
    first = len(_vocabulary(tokenizer_dir) or _vocabulary(base_dir)) or rows
    return CheckpointWeights(components, delta.added_tokens, first, tuple(files))


def _check_required(base_dir: Path, models: Mapping[str, _Model]) -> None:
    missing = next((name for name in _REQUIRED if name not in models), None)
    if missing:
        raise RepositoryError(
            f"{base_dir / missing}: must hold the base's weights as safetensors, got none; add the base again"
        )


def _check_whole(folder: Path, base: Mapping[str, _Model], whole: Mapping[str, _Model]) -> None:
    """A full fine-tune brings at least one model, with the base's names and shapes (its token table may be longer)."""
    if not whole:
        wanted = " or ".join(f"{name}/" for name in _REQUIRED)
        raise RepositoryError(
            f"{folder}: must hold {wanted} with safetensors weights, got neither; a LoRA is kind 'lora'"
        )
    for name, model in whole.items():
        if name not in base:
            continue
        mine, theirs = model.shapes(), base[name].shapes()
        for both in (mine, theirs):
            both[TOKEN_EMBEDDING] = both.get(TOKEN_EMBEDDING, ())[1:]
        different = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if different:
            key = different[0]
            got, needed = (list(shapes[key]) if key in shapes else "nothing" for shapes in (mine, theirs))
            raise RepositoryError(
                f"{folder.name}: {name}.{key}: must be {needed} as in the base, got {got}; {_ANOTHER_BASE}"
            )


# --- whole models on disk


def _models(folder: Path, role: str) -> dict[str, _Model]:
    return {name: model for name in COMPONENTS if (model := _model(folder / name, name, role))}


def _model(folder: Path, component: str, role: str) -> _Model | None:
    """The model in a diffusers sub-folder; None when it has no weights at all, an error when they are pickles."""
    paths = _weight_paths(folder)
    if not paths:
        _refuse_pickles(folder)
        return None
    files = tuple(TensorFile(path) for path in paths)
    stored = {_parameter(component, key): Stored(file, key) for file in files for key in file.names()}
    return _Model(role, files, {name: place for name, place in stored.items() if not name.endswith("position_ids")})


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


def _vocabulary(base_dir: Path) -> frozenset[str]:
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


# --- deltas on disk


def _delta(files: Sequence[TensorFile], base: Mapping[str, _Model], vocabulary: frozenset[str]) -> Delta:
    shapes = {name: model.shapes() for name, model in base.items()}
    delta = Delta()
    for file in files:
        if file_kind(file) == "lora":
            lora_edits(file, shapes, delta)
        elif file_kind(file) == "custom_diffusion":
            custom_diffusion_edits(file, shapes, delta)
    embeddings = [file for file in files if file_kind(file) == "textual_inversion"]
    embedding_edits(embeddings, shapes, vocabulary, delta)
    return delta


def _delta_files(folder: Path, kind: str) -> list[TensorFile]:
    """The folder's safetensors files by name; exactly one LoRA or Custom-Diffusion file, any number of embeddings."""
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    files = [TensorFile(path) for path in paths]
    kinds = [file_kind(file) for file in files]
    if kind not in kinds:
        got = (
            ", ".join(f"{file.path.name} ({found})" for file, found in zip(files, kinds, strict=True))
            or "no safetensors file"
        )
        raise RepositoryError(f"{folder}: must hold {kind} weights as safetensors, got {got}; add the checkpoint again")
    for single in ("lora", "custom_diffusion"):
        if kinds.count(single) > 1:
            raise RepositoryError(
                f"{folder}: must hold one {single} file, got {kinds.count(single)}; add each as a checkpoint of its own"
            )
    return files


def _refuse_pickles(folder: Path) -> None:
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
