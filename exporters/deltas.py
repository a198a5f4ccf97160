"""What a LoRA, DoRA, Custom-Diffusion or Textual-Inversion file does to a base: one edit per parameter, from headers alone.

The names are those diffusers 0.42 and kohya-ss write. Nothing is read but headers and the small `.alpha` tensors until
an edit is applied. Formulas: LoRA (Hu et al. 2021) W' = W + alpha/r * up @ down; DoRA (Liu et al. 2024) m * W' / |W'|;
Custom Diffusion (Kumari et al. 2022) replaces K and V of cross-attention; Textual Inversion (Gal et al. 2022) appends
rows to the token embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from personalq.errors import RepositoryError

from .tensorfile import Array, TensorFile

Float = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]

TOKEN_EMBEDDING = "embeddings.token_embedding.weight"
SECOND_ENCODER = "text_encoder_2"
TOKEN_TABLES = {"text_encoder": TOKEN_EMBEDDING, SECOND_ENCODER: f"text_model.{TOKEN_EMBEDDING}"}
EMBEDDING_PARTS = {"clip_l": "text_encoder", "clip_g": SECOND_ENCODER}  # the tensors of an SDXL embedding

ANOTHER_BASE = "this delta was made for another base; add it with --base of the model it was trained on"


class Edit(Protocol):
    """What happens to one parameter of the base."""

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]: ...

    def apply(self, base: Array) -> Float: ...


@dataclass(frozen=True)
class LowRank:
    """W + scale * up @ down, in float32. Linear (out, in) and Conv2d (out, in, kh, kw); up (out, r[, 1, 1])."""

    file: TensorFile
    down: str
    up: str
    scale: float

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return base

    def apply(self, base: Array) -> Float:
        down, up = (self.file.read(name).astype(np.float32) for name in (self.down, self.up))
        product = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
        return np.asarray(base, np.float32) + np.float32(self.scale) * product.reshape(base.shape)


@dataclass(frozen=True)
class Scaled:
    """m * V / |V|, V the merged weight: DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5), in float32.

    name: the lengths m, one for each index of `axis` (0: each output, as peft has it); |V| is taken over all other axes.
    """

    merged: LowRank
    name: str
    axis: int

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return base

    def apply(self, base: Array) -> Float:
        weight = self.merged.apply(base)
        others = tuple(axis for axis in range(weight.ndim) if axis != self.axis)
        norm = np.sqrt(np.square(weight).sum(axis=others, keepdims=True))
        length = self.merged.file.read(self.name).astype(np.float32).reshape(norm.shape)
        return weight * np.divide(length, norm, out=np.zeros_like(norm), where=norm > 0)


@dataclass(frozen=True)
class Added:
    """b + scale * bias: the bias half of a LoRA trained with lora_bias."""

    file: TensorFile
    name: str
    scale: float

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return base

    def apply(self, base: Array) -> Float:
        return np.asarray(base, np.float32) + np.float32(self.scale) * self.file.read(self.name).astype(np.float32)


@dataclass(frozen=True)
class Replaced:
    """The file's tensor instead of the base's."""

    file: TensorFile
    name: str

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return self.file.shape(self.name)

    def apply(self, base: Array) -> Float:
        return self.file.read(self.name).astype(np.float32)


@dataclass(frozen=True)
class AppendedRows:
    """The base's first `keep` rows, then every row of the named tensors: (n, C) or (C,), in order."""

    keep: int
    parts: tuple[tuple[TensorFile, str], ...]

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return (self.keep + sum(row_count(file.shape(name)) for file, name in self.parts), base[1])

    def apply(self, base: Array) -> Float:
        rows = [file.read(name).astype(np.float32).reshape(-1, base.shape[1]) for file, name in self.parts]
        return np.concatenate([np.asarray(base[: self.keep], np.float32), *rows])


@dataclass
class Delta:
    """edits[component][parameter], and the tokens to add: (token, its pieces), in the order of their ids."""

    edits: dict[str, dict[str, Edit]] = field(default_factory=dict)
    added_tokens: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def put(self, component: str, parameter: str, edit: Edit) -> None:
        self.edits.setdefault(component, {})[parameter] = edit


def row_count(shape: tuple[int, ...]) -> int:
    """How many vectors an embedding tensor holds: (C,) is one, (n, C) is n."""
    return shape[0] if len(shape) > 1 else 1


def file_kind(file: TensorFile) -> str:
    """'lora', 'custom_diffusion' or 'textual_inversion', from the tensors' names."""
    names = file.names()
    if any("lora" in name or name.endswith(".alpha") for name in names):
        return "lora"
    if any("custom_diffusion" in name or ".attn2." in name for name in names):
        return "custom_diffusion"
    return "textual_inversion"


# --- Custom Diffusion


def custom_diffusion_edits(file: TensorFile, shapes: Mapping[str, Shapes], delta: Delta) -> None:
    """Put the replaced projections into `delta`.

    Names: `...attn2.processor.to_k_custom_diffusion.weight` as diffusers writes, or plain `...attn2.to_k.weight`.
    """
    unet = shapes["unet"]
    unknown = []
    for key in file.names():
        if file.shape(key)[:1] == (0,):
            continue  # an empty tensor: load_attn_procs takes it for "this processor is left as it was"
        name = key.removeprefix("unet.").replace(".processor.", ".").replace("_custom_diffusion", "")
        if name not in unet:
            unknown.append(key)
        elif file.shape(key) != unet[name]:
            got = list(file.shape(key))
            raise RepositoryError(
                f"{file.path.name}: {name}: must fit the base's {list(unet[name])}, got {got}; {ANOTHER_BASE}"
            )
        else:
            delta.put("unet", name, Replaced(file, key))
    if unknown:
        raise unmatched(file, unknown)


# --- Textual Inversion


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
    files: Sequence[TensorFile], shapes: Mapping[str, Shapes], vocabulary: frozenset[str], delta: Delta
) -> None:
    """Append every file's embeddings to the token embeddings, as diffusers' load_textual_inversion does, files in order.

    vocabulary: the base tokenizer's entries; the first new token gets the id len(vocabulary).
    """
    tables = {name: shapes[name][table] for name, table in TOKEN_TABLES.items() if name in shapes}
    rows = tables["text_encoder"][0]
    keep = len(vocabulary) or rows
    learned = [one for file in files for one in (_of_two(file) if SECOND_ENCODER in tables else _of_one(file))]
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
    two = next((key for key in file.names() if key in EMBEDDING_PARTS), None)
    if two is not None:
        raise RepositoryError(
            f"{file.path.name}: must be an embedding for one text encoder, got SDXL's {two!r}; {ANOTHER_BASE}"
        )
    names = {key: file.path.stem if key == "emb_params" else key for key in file.names()}
    return [Embedding(file, token, {"text_encoder": key}) for key, token in names.items()]


def _of_two(file: TensorFile) -> list[Embedding]:
    """SDXL: one token, named by the file, with as many vectors for the second text encoder as for the first."""
    shapes = {key: file.shape(key) for key in sorted(file.names())}
    if set(shapes) != set(EMBEDDING_PARTS) or len({row_count(shape) for shape in shapes.values()}) != 1:
        got = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items())
        raise RepositoryError(
            f"{file.path.name}: must hold clip_l and clip_g, as many vectors for each of SDXL's text encoders, got {got}; "
            "add an embedding that was trained on SDXL"
        )
    return [Embedding(file, file.path.stem, {encoder: key for key, encoder in EMBEDDING_PARTS.items()})]


def unmatched(file: TensorFile, keys: Sequence[str]) -> RepositoryError:
    """The refusal for tensors that belong to no parameter of the base; names the first three."""
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return RepositoryError(
        f"{file.path.name}: every tensor must match the base, got {len(keys)} that do not ({shown}); {ANOTHER_BASE}"
    )
