"""Learned embeddings (Textual Inversion) to edits: whose vectors a file holds, and under which tokens.

Forms: diffusers' (a tensor for each token), A1111's (`emb_params`, the file's name is the token), SDXL's (a tensor for each
text encoder, the file's name is the token; or `learned_embeds` and `learned_embeds_2`), and pivotal tuning's, beside a
LoRA: every row of `<name>_emb.safetensors` is a token of its own, `<s0>`, `<s1>` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...errors import RepositoryError
from ..models import SECOND_ENCODER, TOKEN_EMBEDDING
from ..tensorfile import TensorFile
from .edits import ANOTHER_BASE, AppendedRows, Delta, Shapes, row_count

T = TypeVar("T")
TOKEN_TABLES = {"text_encoder": TOKEN_EMBEDDING, SECOND_ENCODER: f"text_model.{TOKEN_EMBEDDING}"}
_OF_SDXL = {"clip_l": "text_encoder", "clip_g": SECOND_ENCODER}  # the tensors of an SDXL embedding
_OF_ENCODERS = {**_OF_SDXL, "text_encoders_0": "text_encoder", "text_encoders_1": SECOND_ENCODER}
_OF_A1111 = "emb_params"
PIVOTAL = "_emb"  # how the file of a pivotal tuning ends
_SECOND = "_2"  # and that of SDXL's second encoder
_LAYERS = (".weight", ".bias")


def is_embedding(shapes: Shapes) -> bool:
    """Tell whether a file holds vectors under tokens, and no parameters of layers."""
    return bool(shapes) and all(len(shape) in (1, 2) and not name.endswith(_LAYERS) for name, shape in shapes.items())


def learned_tokens(stem: str, shapes: Shapes) -> list[str]:
    """The tokens that an embedding file adds; `stem` is its name without the suffix."""
    if is_pivotal(stem, shapes):
        return [f"<s{i}>" for i in range(max(map(row_count, shapes.values())))]
    generic = {_OF_A1111, *_OF_ENCODERS}
    named = sorted(name for name in shapes if name not in generic)
    return named if named else [stem]


def is_pivotal(stem: str, shapes: Shapes) -> bool:
    """Tell whether each row is a token of its own, as pivotal tuning saves them beside its LoRA."""
    by_encoder = set(shapes) <= set(_OF_ENCODERS)
    return by_encoder and (stem.endswith(PIVOTAL) or not set(shapes) <= set(_OF_SDXL))


def parts_by_encoder(tensors: Mapping[str, T]) -> dict[str, T]:
    """An embedding's tensors by the text encoder that they are for, where the file names encoders and not tokens."""
    return {encoder: tensors[part] for part, encoder in _OF_ENCODERS.items() if part in tensors}


@dataclass(frozen=True)
class Vectors:
    """Rows of a file's tensor: all of them, or the one that `row` says."""

    file: TensorFile
    key: str
    row: int | None = None

    def count(self) -> int:
        """How many vectors."""
        return row_count(self.file.shape(self.key)) if self.row is None else 1


@dataclass(frozen=True)
class Embedding:
    """One learned token, and its vectors by text encoder."""

    token: str
    parts: Mapping[str, Vectors]

    def pieces(self) -> tuple[str, ...]:
        """The token and what diffusers calls its further vectors."""
        n_vectors = next(iter(self.parts.values())).count()
        return (self.token, *(f"{self.token}_{i}" for i in range(1, n_vectors)))


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
    keep = len(vocabulary) or tables["text_encoder"][0]
    learned = [*bundled, *_learned(files, tables)]
    tokens: list[tuple[str, tuple[str, ...]]] = []
    for one in learned:
        _check_widths(one, tables)
        pieces = one.pieces()
        taken = [piece for piece in pieces if piece in vocabulary or any(piece in others for _, others in tokens)]
        if taken:
            name = next(iter(one.parts.values())).file.path.name
            raise RepositoryError(
                f"{name}: token must be new to the base's tokenizer, got {taken[0]!r}; rename it in the file"
            )
        tokens.append((one.token, pieces))
    if learned:
        for encoder in tables:
            parts = tuple((one.parts[encoder].file, one.parts[encoder].key, one.parts[encoder].row) for one in learned)
            delta.put(encoder, TOKEN_TABLES[encoder], AppendedRows(keep, parts))
        delta.added_tokens += tuple(tokens)


def _learned(files: Sequence[TensorFile], tables: Mapping[str, tuple[int, ...]]) -> list[Embedding]:
    """Every token of the files, in their order. Raises RepositoryError when one has no vector for a text encoder."""
    by_stem = {file.path.stem: file for file in files}
    found: list[Embedding] = []
    for stem, file in by_stem.items():
        if SECOND_ENCODER in tables and stem.endswith(_SECOND) and stem.removesuffix(_SECOND) in by_stem:
            continue  # taken with the first
        found += _of_file(file, by_stem.get(f"{stem}{_SECOND}"), tables)
    return found


def _of_file(file: TensorFile, second: TensorFile | None, tables: Mapping[str, tuple[int, ...]]) -> list[Embedding]:
    encoders = parts_by_encoder({key: key for key in file.names()})
    if encoders and len(encoders) == len(file.names()):
        _check_encoders(file, encoders, tables)
        parts = {encoder: key for encoder, key in encoders.items() if encoder in tables}
        tokens = learned_tokens(file.path.stem, file.shapes)
        if is_pivotal(file.path.stem, file.shapes):
            return [
                Embedding(token, {encoder: Vectors(file, key, row) for encoder, key in parts.items()})
                for row, token in enumerate(tokens)
            ]
        return [Embedding(tokens[0], {encoder: Vectors(file, key) for encoder, key in parts.items()})]
    if SECOND_ENCODER not in tables:
        names = {key: file.path.stem if key == _OF_A1111 else key for key in file.names()}
        return [Embedding(token, {"text_encoder": Vectors(file, key)}) for key, token in names.items()]
    if second is None or set(second.names()) != set(file.names()):
        raise _half(file)
    return [
        Embedding(key, {"text_encoder": Vectors(file, key), SECOND_ENCODER: Vectors(second, key)})
        for key in file.names()
    ]


def _check_encoders(file: TensorFile, encoders: Mapping[str, str], tables: Mapping[str, tuple[int, ...]]) -> None:
    """As many vectors for each text encoder of the base, and none for one that it does not have."""
    if SECOND_ENCODER in encoders and SECOND_ENCODER not in tables:
        raise RepositoryError(
            f"{file.path.name}: must be an embedding for one text encoder, got SDXL's "
            f"{encoders[SECOND_ENCODER]!r}; {ANOTHER_BASE}"
        )
    counts = {row_count(file.shape(key)) for key in encoders.values()}
    if not tables.keys() <= encoders.keys() or len(counts) != 1:
        raise _half(file)


def _half(file: TensorFile) -> RepositoryError:
    got = ", ".join(f"{key} {list(file.shape(key))}" for key in file.names())
    return RepositoryError(
        f"{file.path.name}: must hold clip_l and clip_g, as many vectors for each of SDXL's text encoders, got {got}; "
        "add an embedding that was trained on SDXL"
    )


def _check_widths(one: Embedding, tables: Mapping[str, tuple[int, ...]]) -> None:
    for encoder, part in one.parts.items():
        shape, width = part.file.shape(part.key), tables[encoder][1]
        if not 1 <= len(shape) <= 2 or shape[-1] != width or part.count() < 1:
            wanted = f"vectors of the base's width {width}"
            name = part.file.path.name
            raise RepositoryError(f"{name}: {part.key}: must be {wanted}, got {list(shape)}; {ANOTHER_BASE}")
