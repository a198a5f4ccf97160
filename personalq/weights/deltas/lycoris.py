"""The edits of LyCORIS' algorithms (Yeh et al. 2024, arXiv 2309.14859), in float32. Knows formulas, not files' spellings.

LoHa (Hyeon-Woo et al. 2022), LoKr (a Kronecker product), LoCon with Tucker's decomposition, GLoRA (Chavan et al. 2023),
(IA)^3 (Liu et al. 2022), diagonal OFT (Qiu et al. 2023) and BOFT (Liu et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from ..tensorfile import Array, TensorFile
from .edits import Factors, Float, Kept, Read, Sum


@dataclass(frozen=True)
class Matrix:
    """One matrix of a change: the whole tensor (n, m, ...), a (n, r) @ b (r, m, ...), or a, b and a core as `tucker` has it."""

    file: TensorFile
    names: tuple[str, ...]

    def shape(self) -> tuple[int, ...]:
        shapes = [self.file.shape(name) for name in self.names]
        if len(shapes) == 1:
            return shapes[0]
        if len(shapes) == 2:
            return (shapes[0][0], *shapes[1][1:])
        return (shapes[0][1], shapes[1][1], *shapes[2][2:])

    def inner(self) -> int | None:
        """The rank r of a product of two or three; None for a whole tensor."""
        return None if len(self.names) == 1 else self.file.shape(self.names[1])[0]

    def widest(self) -> int:
        """The most its rank can be, the axes after the first taken as one."""
        rows, *columns = self.shape()
        return min(rows, prod(columns), self.inner() or rows)

    def fits(self) -> bool:
        """Tell whether the tensors can be multiplied with each other."""
        shapes = [self.file.shape(name) for name in self.names]
        if any(len(shape) < 2 for shape in shapes):
            return False
        if len(shapes) == 3:
            return shapes[2][:2] == (shapes[0][0], shapes[1][0]) and len(shapes[0]) == len(shapes[1]) == 2
        return len(shapes) == 1 or (len(shapes[0]) == 2 and shapes[0][1] == shapes[1][0])

    def factors(self) -> Factors:
        """The matrix as a product; a whole one is itself times the identity."""
        parts = [self.file.read(name).astype(np.float32) for name in self.names]
        if len(parts) == 1:
            flat = parts[0].reshape(len(parts[0]), -1)
            one = np.eye(min(flat.shape), dtype=np.float32)
            return (one, flat) if len(flat) <= flat.shape[1] else (flat, one)
        if len(parts) == 2:
            return parts[0], parts[1].reshape(len(parts[1]), -1)
        inner = np.moveaxis(np.tensordot(parts[1], parts[2], axes=(0, 1)), 1, 0)  # i, q, ...
        return parts[0].T, inner.reshape(len(inner), -1)

    def read(self) -> Float:
        """The matrix in float32, the axes after the second as the file has them."""
        parts = [self.file.read(name).astype(np.float32) for name in self.names]
        if len(parts) == 1:
            return parts[0]
        if len(parts) == 2:
            return (parts[0] @ parts[1].reshape(len(parts[1]), -1)).reshape(self.shape())
        return tucker(parts[2], parts[0], parts[1])


def tucker(core: Float, up: Float, down: Float) -> Float:
    """W[p, q, ...] = sum over i, j of core[i, j, ...] * up[i, p] * down[j, q]; core (r, r, kh, kw)."""
    inner = np.tensordot(down, core, axes=(0, 1))  # q, i, ...
    return np.asarray(np.tensordot(up, inner, axes=(0, 1)), np.float32)


@dataclass(frozen=True)
class Tucker(Sum):
    """W + scale * up (x) mid (x) down: a LoCon of a convolution, up (out, r, 1, 1), mid (r, r, kh, kw), down (r, in, 1, 1)."""

    file: TensorFile
    down: str
    mid: str
    up: str
    scale: float

    @property
    def rank(self) -> int:
        return self.file.shape(self.up)[1]

    def factors(self, read: Read) -> Factors:
        """up (out, r) and mid (x) down (r, in * kh * kw)."""
        down, mid, up = (self.file.read(name).astype(np.float32) for name in (self.down, self.mid, self.up))
        inner = np.einsum("ij...,jq->iq...", mid, down.reshape(down.shape[:2]))
        return np.float32(self.scale) * up.reshape(up.shape[:2]), inner.reshape(len(inner), -1)

    def delta(self, base: tuple[int, ...]) -> Float:
        down, mid, up = (self.file.read(name).astype(np.float32) for name in (self.down, self.mid, self.up))
        product = tucker(mid, up.reshape(up.shape[:2]).T, down.reshape(down.shape[:2]))
        return np.float32(self.scale) * product.reshape(base)


@dataclass(frozen=True)
class Hadamard(Sum):
    """W + scale * first * second, element by element: LoHa. Its rank is the product of both."""

    first: Matrix
    second: Matrix
    scale: float

    @property
    def rank(self) -> int:
        return self.first.widest() * self.second.widest()

    def factors(self, read: Read) -> Factors:
        """(u d) * (v e), element by element, is the product of every column of u with every one of v, and of d's and e's rows."""
        (u, d), (v, e) = self.first.factors(), self.second.factors()
        up = (u[:, :, None] * v[:, None, :]).reshape(len(u), -1)
        down = (d[:, None, :] * e[None, :, :]).reshape(-1, d.shape[1])
        return np.float32(self.scale) * up, down

    def delta(self, base: tuple[int, ...]) -> Float:
        return np.float32(self.scale) * self.first.read().reshape(base) * self.second.read().reshape(base)


@dataclass(frozen=True)
class Kronecker(Sum):
    """W + scale * first (x) second: LoKr. first (a, c), second (b, d[, kh, kw]) -> (a * b, c * d[, kh, kw])."""

    first: Matrix
    second: Matrix
    scale: float

    @property
    def rank(self) -> int:
        return self.first.widest() * self.second.widest()

    def factors(self, read: Read) -> Factors:
        """(u d) (x) (v e) = (u (x) v) (d (x) e)."""
        (u, d), (v, e) = self.first.factors(), self.second.factors()
        return np.float32(self.scale) * np.kron(u, v), np.kron(d, e)

    def delta(self, base: tuple[int, ...]) -> Float:
        second = self.second.read()
        first = self.first.read()
        product = np.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)
        return np.asarray(np.float32(self.scale) * product.reshape(base), np.float32)


@dataclass(frozen=True)
class Generalised(Kept):
    """W + scale * (W a1 a2 + b1 b2): GLoRA. a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in[, kh, kw])."""

    file: TensorFile
    a1: str
    a2: str
    b1: str
    b2: str
    scale: float

    @property
    def rank(self) -> int | None:
        """Twice r for a Linear: W a1 and b1 side by side, a2 over b2. A convolution mixes its channels at every place."""
        return 2 * self.file.shape(self.b2)[0] if len(self.file.shape(self.b2)) == 2 else None

    def factors(self, read: Read) -> Factors:
        """[W a1, b1] and [a2; b2] of a Linear."""
        a1, a2, b1, b2 = (self.file.read(name).astype(np.float32) for name in (self.a1, self.a2, self.b1, self.b2))
        left = np.asarray(read(), np.float32) @ a1.reshape(len(a1), -1)
        up = np.concatenate([left, b1.reshape(len(b1), -1)], axis=1)
        return np.float32(self.scale) * up, np.concatenate([a2.reshape(len(a2), -1), b2.reshape(len(b2), -1)])

    def apply(self, base: Array) -> Float:
        weight = np.asarray(base, np.float32)
        tensors = (self.file.read(name).astype(np.float32) for name in (self.a1, self.a2, self.b1, self.b2))
        a1, a2, b1, b2 = (tensor.reshape(len(tensor), -1) for tensor in tensors)
        inputs_last = np.moveaxis(weight, 1, -1)
        turned = np.moveaxis(inputs_last @ a1 @ a2, -1, 1)
        change = turned + (b1 @ b2).reshape(weight.shape)
        return np.asarray(weight + np.float32(self.scale) * change, np.float32)


@dataclass(frozen=True)
class Grown(Kept):
    """W * (1 + w), w one number for each index of `axis` (0: outputs, 1: inputs): (IA)^3."""

    file: TensorFile
    name: str
    axis: int

    def apply(self, base: Array) -> Float:
        side = [1] * base.ndim
        side[self.axis] = base.shape[self.axis]
        factor = np.float32(1) + self.file.read(self.name).astype(np.float32).reshape(side)
        return np.asarray(base, np.float32) * factor


@dataclass(frozen=True)
class Turned(Kept):
    """rescale * R^T W, R block-diagonal over the outputs: OFT. blocks (n, b, b) with n * b outputs.

    The blocks are R itself (is_rotation), or what Cayley's transform makes R of (`rotations`).
    """

    file: TensorFile
    blocks: str
    rescale: str | None
    limit: float
    is_rotation: bool

    def apply(self, base: Array) -> Float:
        blocks = self.file.read(self.blocks).astype(np.float64)
        turns = blocks if self.is_rotation else rotations(blocks, self.limit)
        n, b, _ = turns.shape
        weight = np.swapaxes(turns, 1, 2) @ np.asarray(base, np.float64).reshape(n, b, -1)
        return _rescaled(weight.reshape(base.shape), self.file, self.rescale)


@dataclass(frozen=True)
class Butterfly(Kept):
    """rescale * B_m ... B_1 W: BOFT. blocks (m, n, b, b); stage i turns blocks of outputs that lie 2^i * b / 2 apart."""

    file: TensorFile
    blocks: str
    rescale: str | None
    limit: float

    def apply(self, base: Array) -> Float:
        turns = rotations(self.file.read(self.blocks).astype(np.float64), self.limit)
        outputs, b = base.shape[0], turns.shape[-1]
        weight = np.asarray(base, np.float64).reshape(outputs, -1)
        for i, turn in enumerate(turns):
            apart = 2**i * b // 2
            paired = weight.reshape(-1, 2, apart, weight.shape[1]).swapaxes(1, 2).reshape(-1, b, weight.shape[1])
            turned = (turn @ paired).reshape(-1, apart, 2, weight.shape[1])
            weight = turned.swapaxes(1, 2).reshape(outputs, -1)
        return _rescaled(weight.reshape(base.shape), self.file, self.rescale)


def rotations(blocks: Array, limit: float) -> Array:
    """Cayley's transform of each block, (I + Q) (I - Q)^-1 with Q = block - block^T; |Q| of them all is at most `limit` > 0."""
    skew = blocks - np.swapaxes(blocks, -1, -2)
    length = np.sqrt(np.square(skew).sum()) + 1e-8
    if 0 < limit < length:
        skew = skew * (limit / length)
    one = np.eye(blocks.shape[-1])
    turns: Array = (one + skew) @ np.linalg.inv(one - skew)
    return turns


def _rescaled(weight: Array, file: TensorFile, name: str | None) -> Float:
    """The weight in float32, each output times its factor where the file has one."""
    if name is not None:
        weight = weight * file.read(name).astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    return weight.astype(np.float32)
