"""What a delta does to the base: one edit per parameter. Applying an edit is arithmetic in float32, tensor by tensor.

Formulas: LoRA (Hu et al. 2021) W' = W + alpha/r * up @ down; DoRA (Liu et al. 2024) m * W' / |W'|; Custom Diffusion
(Kumari et al. 2022) replaces K and V of cross-attention; Textual Inversion (Gal et al. 2022) appends rows to the token
embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...errors import RepositoryError
from ..tensorfile import Array, TensorFile

Float = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]

ANOTHER_BASE = "add it with --base of the model it was trained on"


# up (N, r), down (r, K): the change is up @ down, a convolution's axes after N taken as one
Factors = tuple[Float, Float]
Read = Callable[
    [], Array
]  # of the base's parameter, for the few that need it: a view, or a copy where the file has BF16


class Edit(Protocol):
    """What happens to one parameter of the base.

    rank: the change is exactly a product this wide (or narrower), which `factors` gives; None: it is not known to be one.
    """

    @property
    def rank(self) -> int | None: ...

    def factors(self, read: Read) -> Factors:
        """The change of the base's parameter as a product, float32; only where there is a rank."""

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]: ...

    def apply(self, base: Array) -> Float: ...


class Kept:
    """An edit that leaves the shape as it is, and is no product of two narrow matrices."""

    @property
    def rank(self) -> int | None:
        return None

    def factors(self, read: Read) -> Factors:
        raise NotImplementedError(f"{type(self).__name__} is no product")

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return base


class Sum(Kept, ABC):
    """W + delta, in float32: what depends on the file alone."""

    @abstractmethod
    def delta(self, base: tuple[int, ...]) -> Float:
        """What is added to a parameter of this shape."""

    def apply(self, base: Array) -> Float:
        return np.asarray(base, np.float32) + self.delta(base.shape)


@dataclass(frozen=True)
class LowRank(Sum):
    """W + scale * up @ down, in float32. Linear (out, in) and Conv2d (out, in, kh, kw); up (out, r[, 1, 1])."""

    file: TensorFile
    down: str
    up: str
    scale: float

    @property
    def rank(self) -> int:
        return self.file.shape(self.down)[0]

    def factors(self, read: Read) -> Factors:
        down, up = (self.file.read(name).astype(np.float32) for name in (self.down, self.up))
        return np.float32(self.scale) * up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)

    def delta(self, base: tuple[int, ...]) -> Float:
        down, up = (self.file.read(name).astype(np.float32) for name in (self.down, self.up))
        product = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
        return np.float32(self.scale) * product.reshape(base)


@dataclass(frozen=True)
class Scaled(Kept):
    """m * V / |V|, V the merged weight: DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5), in float32.

    name: the lengths m, one for each index of `axis` (0: each output, as peft has it); |V| is taken over all other axes.
    """

    merged: Edit
    file: TensorFile
    name: str
    axis: int

    def apply(self, base: Array) -> Float:
        weight = self.merged.apply(base)
        others = tuple(axis for axis in range(weight.ndim) if axis != self.axis)
        norm = np.sqrt(np.square(weight).sum(axis=others, keepdims=True))
        length = self.file.read(self.name).astype(np.float32).reshape(norm.shape)
        scaled: Float = weight * np.divide(length, norm, out=np.zeros_like(norm), where=norm > 0)
        return scaled


@dataclass(frozen=True)
class Added(Sum):
    """W + scale * tensor, in float32: a bias, a norm, or a whole weight that was trained as a difference."""

    file: TensorFile
    name: str
    scale: float = 1.0

    def delta(self, base: tuple[int, ...]) -> Float:
        return np.float32(self.scale) * self.file.read(self.name).astype(np.float32).reshape(base)


@dataclass(frozen=True)
class Replaced(Kept):
    """The file's tensor instead of the base's."""

    file: TensorFile
    name: str

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        return self.file.shape(self.name)

    def apply(self, base: Array) -> Float:
        return self.file.read(self.name).astype(np.float32)


@dataclass(frozen=True)
class AppendedRows(Kept):
    """The base's first `keep` rows, then rows of the named tensors, in order: (n, C) or (C,), one of them or all (None)."""

    keep: int
    parts: tuple[tuple[TensorFile, str, int | None], ...]

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        added = (row_count(file.shape(name)) if row is None else 1 for file, name, row in self.parts)
        return (self.keep + sum(added), base[1])

    def rows(self, width: int) -> Float:
        """What is appended, (n, width)."""
        vectors: Float = np.concatenate(
            [
                file.read(name).astype(np.float32).reshape(-1, width)[slice(row, None if row is None else row + 1)]
                for file, name, row in self.parts
            ]
        )
        return vectors

    def apply(self, base: Array) -> Float:
        table: Float = np.concatenate([np.asarray(base[: self.keep], np.float32), self.rows(base.shape[1])])
        return table


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


def unmatched(file: TensorFile, keys: Sequence[str]) -> RepositoryError:
    """The refusal for tensors that belong to no parameter of the base; names the first three."""
    shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    return RepositoryError(
        f"{file.path.name}: every tensor must match the base, got {len(keys)} that do not ({shown}); {ANOTHER_BASE}"
    )
