"""Embeddings inside a LoRA file (A1111, OneTrainer, kohya-ss): `bundle_emb.<token>.<tensor>`, one token each."""

from __future__ import annotations

from ...errors import RepositoryError
from ..models import SECOND_ENCODER
from ..tensorfile import TensorFile
from .edits import Shapes, row_count
from .embeddings import Embedding, Vectors
from .lora_names import BUNDLED

_ONE = ("clip_l", "emb_params", "string_to_param.*")  # OneTrainer; A1111's two forms
_TWO = {"text_encoder": "clip_l", SECOND_ENCODER: "clip_g"}


def bundled_tokens(shapes: Shapes) -> list[str]:
    """The tokens that a LoRA file brings embeddings for, sorted."""
    return sorted({_split(name)[0] for name in shapes if name.startswith(BUNDLED)})


def bundled_embeddings(file: TensorFile, has_two: bool) -> list[Embedding]:
    """The file's embeddings, by token. has_two: the base has two text encoders, and each token a tensor for both.

    Raises RepositoryError for a tensor that is no embedding of the base's text encoders.
    """
    tensors: dict[str, dict[str, str]] = {}
    for name in file.names():
        if name.startswith(BUNDLED):
            token, tensor = _split(name)
            tensors.setdefault(token, {})[tensor] = name
    return [_embedding(file, token, tensors[token], has_two) for token in sorted(tensors)]


def _split(name: str) -> tuple[str, str]:
    """A token has no dot in it, a tensor's name may."""
    token, _, tensor = name.removeprefix(BUNDLED).partition(".")
    return token, tensor


def _embedding(file: TensorFile, token: str, tensors: dict[str, str], has_two: bool) -> Embedding:
    if has_two:
        keys = {encoder: tensors.get(tensor, "") for encoder, tensor in _TWO.items()}
        wanted = "clip_l and clip_g, as many vectors in both"
        is_whole = set(tensors) == set(_TWO.values())
        is_whole = is_whole and len({row_count(file.shape(key)) for key in keys.values()}) == 1
    else:
        keys = {"text_encoder": next(iter(tensors.values()))}
        wanted = f"one of {', '.join(_ONE)}"
        is_whole = len(tensors) == 1 and next(iter(tensors)) in _ONE
    if not is_whole or not token:
        got = ", ".join(f"{tensor} {list(file.shape(name))}" for tensor, name in sorted(tensors.items()))
        raise RepositoryError(
            f"{file.path.name}: {BUNDLED}{token}: must hold {wanted}, got {got}; train the LoRA without this embedding"
        )
    return Embedding(token, {encoder: Vectors(file, key) for encoder, key in keys.items()})
