"""A checkpoint's weights by torch parameter name, tensor by tensor, with its delta merged. numpy only, memory-mapped.

`open_weights` reads headers and refuses what does not fit; a tensor's bytes are touched when it is read. Names are
those of diffusers 0.42 / transformers 5 modules, whichever spelling a file has: text_encoder (CLIPTextModel) without
the `text_model.` prefix, text_encoder_2 (CLIPTextModelWithProjection) with it, a VAE's attention `to_q`, not `query`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RepositoryError
from .deltas.edits import ANOTHER_BASE, Delta, Edit
from .deltas.kinds import delta_of, file_kind
from .deltas.lora import adapter_paths, is_adapter
from .models import COMPONENTS, REQUIRED, TOKEN_EMBEDDING, Model, Stored, read_models, read_vocabulary
from .one_file.original import read_original
from .pickles import refuse_pickles
from .tensorfile import Array, TensorFile


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
        base = self._find(name).shape
        return self._edits[name].shape(base) if name in self._edits else base

    def edit(self, name: str) -> Edit | None:
        """What a delta does to a parameter; None: nothing, or the whole model is the checkpoint's own."""
        return self._edits.get(name)

    def read(self, name: str) -> Array:
        """The merged tensor: float32 where a delta edits it or the file has BF16, else a read-only view of the file."""
        base = self._find(name).read()
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
    """

    components: Mapping[str, ComponentWeights]
    added_tokens: tuple[tuple[str, tuple[str, ...]], ...]
    first_added_id: int

    def pieces(self) -> list[str]:
        """Every piece of every added token, in the order of their ids."""
        return [piece for _, group in self.added_tokens for piece in group]

    def check_ids(self, id_of: Callable[[str], int | None], where: str = "") -> None:
        """Raise RepositoryError unless a tokenizer that was taught the pieces gives each the id of its row."""
        for offset, piece in enumerate(self.pieces()):
            wanted, found = self.first_added_id + offset, id_of(piece)
            if found != wanted:
                raise RepositoryError(
                    f"{where}token {piece}: must get id {wanted}, got {found}; "
                    "the base already knows this token: rename it in the checkpoint"
                )

    def component(self, name: str) -> ComponentWeights:
        """One of COMPONENTS. Raises RepositoryError when the checkpoint has no such model."""
        if name not in self.components:
            raise RepositoryError(
                f"{name}: must be one of {', '.join(self.components)}, got a model this checkpoint does not have"
            )
        return self.components[name]


def open_weights(base_dir: Path, checkpoint_dir: Path | None, kind: str) -> CheckpointWeights:
    """Open a base pipeline folder with one checkpoint's delta over it; no delta for `checkpoint_dir` None.

    kind: 'dreambooth' (folders of whole models; what is missing comes from the base), 'lora', 'textual_inversion' or
    'custom_diffusion' (safetensors files in `checkpoint_dir`, told apart by what is in them).
    Raises RepositoryError in one line: missing, truncated or pickled files, names or shapes that do not fit the base.
    """
    base = read_models(base_dir)
    if checkpoint_dir is None:
        return _checkpoint(base_dir, base, {}, base_dir, Delta())
    if not checkpoint_dir.exists():
        raise RepositoryError(
            f"{checkpoint_dir}: must hold the checkpoint's weights, got nothing; run 'personalq add' again"
        )
    refuse_pickles(checkpoint_dir)
    paths = [checkpoint_dir] if checkpoint_dir.is_file() else sorted(checkpoint_dir.glob("*.safetensors"))
    return _over(base_dir, base, checkpoint_dir, paths, kind)


def check_fit(base_dir: Path, source: Path, paths: Sequence[Path], kind: str) -> CheckpointWeights:
    """What `open_weights` will give for this checkpoint over this base; only headers are read. Raises RepositoryError.

    paths: the safetensors files that will lie side by side in the checkpoint's folder.
    """
    return _over(base_dir, read_models(base_dir), source, paths, kind)


def _over(
    base_dir: Path, base: Mapping[str, Model], source: Path, paths: Sequence[Path], kind: str
) -> CheckpointWeights:
    """A checkpoint over its base. paths: the files in its folder; models in folders of their own lie under `source`."""
    files = [TensorFile(path) for path in paths]
    if kind == "dreambooth":
        whole = _whole(source, files, base)
        _check_whole(source, base, whole)
        return _checkpoint(base_dir, base, whole, source, Delta())
    files += [TensorFile(path) for path in adapter_paths(source)]
    _check_kinds(source, files, kind)
    _check_required(base_dir, base)
    vocabulary = read_vocabulary(source) or read_vocabulary(base_dir)
    return _checkpoint(base_dir, base, {}, source, delta_of(files, shapes_of(base), vocabulary))


def _checkpoint(
    base_dir: Path,
    base: Mapping[str, Model],
    whole: Mapping[str, Model],
    tokenizer_dir: Path,
    delta: Delta,
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
    rows = models["text_encoder"].shapes().get(TOKEN_EMBEDDING, (0,))[0]
    first = len(read_vocabulary(tokenizer_dir) or read_vocabulary(base_dir)) or rows
    if first > rows:
        raise RepositoryError(
            f"{tokenizer_dir}/tokenizer: must have at most the {rows} tokens of the text encoder, got {first}; "
            "add it with the text encoder that it was saved with"
        )
    return CheckpointWeights(components, delta.added_tokens, first)


def _check_required(base_dir: Path, models: Mapping[str, Model]) -> None:
    missing = next((name for name in REQUIRED if name not in models), None)
    if missing:
        raise RepositoryError(
            f"{base_dir / missing}: must hold the base's weights as safetensors, got none; add the base again"
        )


def _check_whole(folder: Path, base: Mapping[str, Model], whole: Mapping[str, Model]) -> None:
    """A full fine-tune brings at least one model, with the base's names and shapes (its token table may be longer)."""
    if not whole:
        wanted = " or ".join(f"{name}/" for name in REQUIRED)
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
                f"{folder.name}: {name}.{key}: must be {needed} as in the base, got {got}; {ANOTHER_BASE}"
            )


# --- on disk


def shapes_of(models: Mapping[str, Model]) -> dict[str, dict[str, tuple[int, ...]]]:
    """component -> parameter -> shape."""
    return {name: model.shapes() for name, model in models.items()}


def _whole(source: Path, files: Sequence[TensorFile], base: Mapping[str, Model]) -> dict[str, Model]:
    """The models of a full fine-tune: one file in the original layout, or folders as diffusers writes them."""
    original = next((file for file in files if file_kind(file.shapes) == "original"), None)
    return read_original(original, shapes_of(base)) if original else read_models(source)


def _check_kinds(source: Path, files: Sequence[TensorFile], kind: str) -> None:
    """Exactly one LoRA or Custom-Diffusion file, any number of embeddings."""
    kinds = [file_kind(file.shapes) for file in files]
    if kind not in kinds:
        found = [f"{file.path.name} ({kind})" for file, kind in zip(files, kinds, strict=True)]
        got = ", ".join(found[:3]) or "no safetensors file"
        raise RepositoryError(f"{source}: must hold {kind} weights as safetensors, got {got}; add the checkpoint again")
    beside = [kind for file, kind in zip(files, kinds, strict=True) if not is_adapter(file.path)]
    kinds = beside if len(beside) == len(files) else [*beside, "lora"]  # peft's files are one LoRA
    for single in ("lora", "custom_diffusion"):
        if kinds.count(single) > 1:
            raise RepositoryError(
                f"{source}: must hold one {single} file, got {kinds.count(single)}; add each as a checkpoint of its own"
            )
