"""Learned embeddings (Textual Inversion) to edits: whose vectors a file holds, and under which tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import RepositoryError
from .edits import ANOTHER_BASE, AppendedRows, Delta, Shapes, row_count
from .models import SECOND_ENCODER
from .tensorfile import TensorFile

T = TypeVar("T")
TOKEN_EMBEDDING = "embeddings.token_embedding.weight"
TOKEN_TABLES = {"text_encoder": TOKEN_EMBEDDING, SECOND_ENCODER: f"text_model.{TOKEN_EMBEDDING}"}
_OF_SDXL = {"clip_l": "text_encoder", "clip_g": SECOND_ENCODER}  # the tensors of an SDXL embedding
_OF_A1111 = "emb_params"
_LAYERS = (".weight", ".bias")


def is_embedding(shapes: Shapes) -> bool:
    """Tell whether a file holds vectors under tokens, and no parameters of layers."""
    return bool(shapes) and all(len(shape) in (1, 2) and not name.endswith(_LAYERS) for name, shape in shapes.items())


def named_tokens(shapes: Shapes) -> list[str]:
    """The tokens that an embedding file names itself; A1111's and SDXL's name none, there the file's name is the token."""
    return sorted(name for name in shapes if name not in (_OF_A1111, *_OF_SDXL))


def parts_by_encoder(tensors: Mapping[str, T]) -> dict[str, T]:
    """An SDXL embedding's tensors by the text encoder that they are for."""
    return {encoder: tensors[part] for part, encoder in _OF_SDXL.items() if part in tensors}


@dataclass(frozen=True)
class Embedding:
    """One learned token: the file it is in, and the name of its tensor by text encoder."""

    file: TensorFile
    token: str
    keys: Mapping[str, str]

    def n_vectors(self) -> int:
        return row_count(self.file.shape(next(iter(self.keys.values()))))

    def pieces(self) -> tuple[str, ...]:
        """The token and what diffusers calls its further vectors."""
        return (self.token, *(f"{self.token}_{i}" for i in range(1, self.n_vectors())))


def embedding_edits(
    files: Sequence[TensorFile],
    shapes: Mapping[str, Shapes],
    vocabulary: frozenset[str],
    delta: Delta,
    bundled: Sequence[Embedding] = (),
) -> None:
    """Append every file's embeddings to the token embeddings, as diffusers' load_textual_inversion does, files in order.

    vocabulary: the base tokenizer's entries; the first new token gets the id len(vocabulary). bundled: embeddings that came
    inside a LoRA file; they come first.
    """
    tables = {name: shapes[name][table] for name, table in TOKEN_TABLES.items() if name in shapes}
    rows = tables["text_encoder"][0]
    keep = len(vocabulary) or rows
    learned = [*bundled]
    learned += [one for file in files for one in (_of_two(file) if SECOND_ENCODER in tables else _of_one(file))]
    tokens: list[tuple[str, tuple[str, ...]]] = []
    for one in learned:
        _check_widths(one, tables)
        pieces = one.pieces()
        taken = [piece for piece in pieces if piece in vocabulary or any(piece in others for _, others in tokens)]
        if taken:
            raise RepositoryError(
                f"{one.file.path.name}: token must be new to the base's tokenizer, got {taken[0]!r}; rename it in the file"
            )
        tokens.append((one.token, pieces))
    if keep > rows:
        raise RepositoryError(
            f"tokenizer: must have at most the {rows} tokens of the text encoder, got {keep}; repair the base"
        )
    if learned:
        for encoder in tables:
            parts = tuple((one.file, one.keys[encoder]) for one in learned)
            delta.put(encoder, TOKEN_TABLES[encoder], AppendedRows(keep, parts))
        delta.added_tokens += tuple(tokens)


def _check_widths(one: Embedding, tables: Mapping[str, tuple[int, ...]]) -> None:
    for encoder, key in one.keys.items():
        shape, width = one.file.shape(key), tables[encoder][1]
        if not 1 <= len(shape) <= 2 or shape[-1] != width or row_count(shape) < 1:
            wanted = f"vectors of the base's width {width}"
            raise RepositoryError(f"{one.file.path.name}: {key}: must be {wanted}, got {list(shape)}; {ANOTHER_BASE}")


def _of_one(file: TensorFile) -> list[Embedding]:
    """A token for each tensor. A1111 calls it 'emb_params' and takes the token from the file's name; all others name it."""
    two = next((key for key in file.names() if key in _OF_SDXL), None)
    if two is not None:
        raise RepositoryError(
            f"{file.path.name}: must be an embedding for one text encoder, got SDXL's {two!r}; {ANOTHER_BASE}"
        )
    names = {key: file.path.stem if key == _OF_A1111 else key for key in file.names()}
    return [Embedding(file, token, {"text_encoder": key}) for key, token in names.items()]


def _of_two(file: TensorFile) -> list[Embedding]:
    """SDXL: one token, named by the file, with as many vectors for the second text encoder as for the first."""
    shapes = {key: file.shape(key) for key in sorted(file.names())}
    if set(shapes) != set(_OF_SDXL) or len({row_count(shape) for shape in shapes.values()}) != 1:
        got = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items())
        raise RepositoryError(
            f"{file.path.name}: must hold clip_l and clip_g, as many vectors for each of SDXL's text encoders, got {got}; "
            "add an embedding that was trained on SDXL"
        )
    return [Embedding(file, file.path.stem, {encoder: key for key, encoder in _OF_SDXL.items()})]
