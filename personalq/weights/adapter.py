"""A delta in run-time form: two narrow matrices for each layer, the whole change of a text K/V projection, added vectors.

y = x W + s (x A) B (Hu et al. 2021, arXiv 2106.09685, eq. 3), alpha/rank folded in, float16. A change that is not narrow by
itself is cut to its largest singular values (Eckart and Young 1936); how much that loses is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from ..bundle import ADDED_VECTORS, DOWN, UP
from ..errors import RepositoryError
from .checkpoint import CheckpointWeights, ComponentWeights
from .deltas.edits import AppendedRows, Edit, Float
from .models import SECOND_ENCODER
from .tensorfile import TensorFile

Half = npt.NDArray[np.float16]
ENCODERS = ("text_encoder", SECOND_ENCODER)
CORRECTION = "correction"  # stands where a component's name does
CHANGE = ".change"
TEXT_ROWS = (".attn2.to_k", ".attn2.to_v")  # read by the row encoder, once per prompt: these may change in full
MOST_RANK = 256  # wider branches cost more than they save
ENERGY = 1.0 - 1e-6  # of a change's squares that a rank found by singular values keeps, unless said otherwise


@dataclass(frozen=True)
class Branch:
    """The change of one layer. Linear: down (K, r), up (r, N). Conv2d: down (r, C, kh, kw), up (N, r). float16.

    error: the share of the change's root mean square that is lost, 0..1.
    """

    down: Half
    up: Half
    error: float = 0.0

    @property
    def is_conv(self) -> bool:
        return self.down.ndim == 4

    @property
    def rank(self) -> int:
        return int(self.up.shape[1] if self.is_conv else self.up.shape[0])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the layer's weight: (N, K) or (N, C, kh, kw)."""
        if self.is_conv:
            return (self.up.shape[0], *self.down.shape[1:])
        return (self.up.shape[1], self.down.shape[0])

    def change(self) -> Float:
        """What is added to the layer's weight, float32: (N, K) or (N, C, kh, kw)."""
        down, up = self.down.astype(np.float32), self.up.astype(np.float32)
        if not self.is_conv:
            return np.ascontiguousarray((down @ up).T)
        return (up @ down.reshape(len(down), -1)).reshape(len(up), *down.shape[1:])


@dataclass(frozen=True)
class Adapter:
    """branches: component -> layer. changes: layer of TEXT_ROWS -> W' - W (N, K) float16. added: text encoder -> (n, C) float16.

    left_out: what of the delta has no place here, in words; [] where the adapter is the whole delta.
    correction: layer of the UNet -> what makes up for the rounding of one base's spec (adapters.Correction).
    """

    branches: Mapping[str, Mapping[str, Branch]] = field(default_factory=dict)
    changes: Mapping[str, Half] = field(default_factory=dict)
    added: Mapping[str, Half] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    correction: Mapping[str, Branch] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest of its layers'."""
        return max((branch.rank for layers in self.branches.values() for branch in layers.values()), default=0)

    def tensors(self) -> dict[str, Half]:
        """As they are named in the file."""
        found: dict[str, Half] = {}
        for component, layers in (*self.branches.items(), (CORRECTION, self.correction)):
            for layer, branch in layers.items():
                found[f"{component}.{layer}{DOWN}"], found[f"{component}.{layer}{UP}"] = branch.down, branch.up
        found |= {f"unet.{layer}{CHANGE}": change for layer, change in self.changes.items()}
        return found | {f"{encoder}.{ADDED_VECTORS}": vectors for encoder, vectors in self.added.items()}

    def to_bytes(self) -> bytes:
        """The file: safetensors, names sorted, so that equal adapters are equal bytes."""
        return save({name: np.asarray(array, order="C") for name, array in sorted(self.tensors().items())})


def read_adapter(path: Path) -> Adapter:
    """An adapter's file, memory-mapped. Raises RepositoryError for a tensor that no adapter has, or that is not finite."""
    file = TensorFile(path)
    branches: dict[str, dict[str, Branch]] = {}
    changes, added = dict[str, Half](), dict[str, Half]()
    for name in file.names():
        component, _, rest = name.partition(".")
        if rest == ADDED_VECTORS:
            added[component] = _read(file, name)
        elif rest.endswith(CHANGE):
            changes[rest.removesuffix(CHANGE)] = _read(file, name)
        elif rest.endswith(DOWN) and f"{name.removesuffix(DOWN)}{UP}" in file.entries:
            layer = rest.removesuffix(DOWN)
            pair = _read(file, name), _read(file, f"{name.removesuffix(DOWN)}{UP}")
            branches.setdefault(component, {})[layer] = Branch(*pair)
        elif not (rest.endswith(UP) and f"{name.removesuffix(UP)}{DOWN}" in file.entries):
            raise RepositoryError(
                f"{path}: must hold pairs of {DOWN} and {UP}, got {name!r}; export the checkpoint again"
            )
    correction = branches.pop(CORRECTION, {})
    return Adapter(branches, changes, added, correction=correction)


def _read(file: TensorFile, name: str) -> Half:
    array = file.read(name)
    if array.dtype != np.float16:
        raise RepositoryError(f"{file.path}: {name}: must be F16, got {array.dtype}; export the checkpoint again")
    return array


# --- from a delta


@dataclass(frozen=True)
class Limits:
    """Of a layer's rank: the most it may be, and the share of a change's squares that is enough where it is cut."""

    rank: int = MOST_RANK
    energy: float = ENERGY


def why_not(weights: CheckpointWeights) -> str:
    """Why a delta is no adapter exactly, in words; '' where it is one. Reads no tensor."""
    for component, model in weights.components.items():
        for name in sorted(model.changed):
            edit, where = model.edit(name), f"{component}.{name}"
            if edit is None:
                return f"{where} is replaced: a full fine-tune"
            kind = _kind(component, name, model.shape(name), edit)
            if kind == "left out":
                return f"it changes {where}, which no adapter holds"
            if kind == "branch" and edit.rank is None:
                return f"its change of {where} is no low-rank product"
            if kind == "branch" and (edit.rank or 0) > MOST_RANK:
                return f"its change of {where} has rank {edit.rank}, an adapter's is at most {MOST_RANK}"
    return ""


def adapter_of(
    weights: CheckpointWeights,
    base: CheckpointWeights,
    limits: Limits | None = None,
    report: Callable[[str, float], None] = lambda text, done: None,
) -> Adapter:
    """The adapter of a checkpoint over its base, exact where `why_not` is '', else as near as `limits` allow.

    report(text, fraction) as it goes on: singular values of a whole UNet take minutes.
    Raises RepositoryError for a delta with NaN or Inf in it, or that float16 cannot hold.
    """
    limits = limits or Limits()
    branches: dict[str, dict[str, Branch]] = {}
    changes, added = dict[str, Half](), dict[str, Half]()
    left_out: list[str] = []
    n_done, n_changed = 0, sum(len(model.changed) for model in weights.components.values())
    for component, model in weights.components.items():
        for name in sorted(model.changed):
            where, layer, edit = f"{component}.{name}", name.removesuffix(".weight"), model.edit(name)
            report(f"adapter: {where}", n_done / n_changed)
            n_done += 1
            kind = _kind(component, name, model.shape(name), edit)
            if kind == "tokens" and isinstance(edit, AppendedRows):
                added[component] = _half(edit.rows(model.shape(name)[1]), where)
            elif kind == "left out":
                left_out += [where] if _differs(model, base.component(component), name) else []
            elif kind == "text rows":
                change = _half(_change(model, base.component(component), name), where)
                changes |= {layer: change} if change.any() else {}
            elif branch := _branch(model, base.component(component), name, limits, where):
                branches.setdefault(component, {})[layer] = branch
    return Adapter(branches, changes, added, tuple(left_out))


def _kind(component: str, name: str, shape: tuple[int, ...], edit: Edit | None) -> str:
    """What a changed parameter becomes: 'tokens', 'text rows' (a change in full), 'branch', or 'left out'."""
    if isinstance(edit, AppendedRows):
        return "tokens"
    if component == "vae" or not name.endswith(".weight") or len(shape) not in (2, 4) or "embedding.weight" in name:
        return "left out"
    is_text = component == "unet" and name.removesuffix(".weight").endswith(TEXT_ROWS)
    return "text rows" if is_text and (edit is None or edit.rank is None) else "branch"


def _change(model: ComponentWeights, base: ComponentWeights, name: str) -> Float:
    return np.asarray(model.read(name), np.float32) - np.asarray(base.read(name), np.float32)


def _differs(model: ComponentWeights, base: ComponentWeights, name: str) -> bool:
    return model.shape(name) != base.shape(name) or bool(_change(model, base, name).any())


def _branch(model: ComponentWeights, base: ComponentWeights, name: str, limits: Limits, where: str) -> Branch | None:
    """One layer's matrices; None where it does not change."""
    edit, shape = model.edit(name), base.shape(name)
    n, k = shape[0], int(np.prod(shape[1:]))
    rank = edit.rank if edit is not None else None
    if edit is not None and rank is not None and rank <= min(n, k):
        up, down = (_finite(half, where) for half in edit.factors(lambda: base.read(name)))
        up, down, error = (up, down, 0.0) if rank <= limits.rank else narrowed(up, down, limits)
    else:
        change = _finite(_change(model, base, name), where).reshape(n, k)
        if not change.any():
            return None
        # a product wider than the layer is what it is: only the most that a rank may be cuts it
        up, down, error = truncated(change, limits if rank is None else replace(limits, energy=1.0))
    up, down = balanced(up, down)
    if len(shape) == 4:
        return Branch(_half(down.reshape(-1, *shape[1:]), where), _half(up, where), error)
    return Branch(_half(down.T, where), _half(up.T, where), error)


def truncated(change: Float, limits: Limits) -> tuple[Float, Float, float]:
    """(N, K) -> up (N, r), down (r, K), and the share lost: its largest singular values, by the smaller Gram matrix."""
    is_tall = change.shape[0] > change.shape[1]
    wide = (change.T if is_tall else change).astype(np.float64)
    values, vectors = np.linalg.eigh(wide @ wide.T)
    order = np.argsort(values)[::-1]
    squares, vectors = np.clip(values[order], 0, None), vectors[:, order]
    rank, error = _cut(squares, limits)
    left = vectors[:, :rank]
    right = left.T @ wide
    up, down = (right.T, left.T) if is_tall else (left, right)
    return up.astype(np.float32), down.astype(np.float32), error


def narrowed(up: Float, down: Float, limits: Limits) -> tuple[Float, Float, float]:
    """The same product, cut to fewer columns: the singular values of a product of two triangles (Golub and Van Loan, 5.4)."""
    (q, r), (p, s) = np.linalg.qr(up.astype(np.float64)), np.linalg.qr(down.T.astype(np.float64))
    left, values, right = np.linalg.svd(r @ s.T)
    rank, error = _cut(values**2, limits)
    return (
        ((q @ left[:, :rank]) * values[:rank]).astype(np.float32),
        (right[:rank] @ p.T).astype(np.float32),
        error,
    )


def _cut(squares: npt.NDArray[np.float64], limits: Limits) -> tuple[int, float]:
    """(rank, share of the root mean square that is lost) for singular values' squares, largest first."""
    total = float(squares.sum())
    kept = np.cumsum(squares)
    rank = min(int(np.searchsorted(kept, limits.energy * total)) + 1, limits.rank, len(squares))
    return rank, float(np.sqrt(max(total - kept[rank - 1], 0.0) / total)) if total else 0.0


def balanced(up: Float, down: Float) -> tuple[Float, Float]:
    """The same product with a power of two moved from one side to the other, so that both lie in float16's middle."""
    most, least = float(np.abs(up).max(initial=0)), float(np.abs(down).max(initial=0))
    if not (most > 0 and least > 0 and np.isfinite(most) and np.isfinite(least)):
        return up, down
    move = np.float32(2.0 ** round((np.log2(most) - np.log2(least)) / 2))
    return up / move, down * move


def _half(array: npt.NDArray[np.floating], where: str) -> Half:
    with np.errstate(over="ignore"):
        half = np.asarray(_finite(array, where), np.float16)
    if not np.isfinite(half).all():
        raise _not_finite(where, f"{float(np.abs(array).max()):.3g}, over float16's 65504")
    return half


def _finite(array: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    if not np.isfinite(array).all():
        raise _not_finite(where, "NaN or Inf")
    return array


def _not_finite(where: str, got: str) -> RepositoryError:
    return RepositoryError(f"{where}: the delta must be finite, got {got}; save the checkpoint again")
