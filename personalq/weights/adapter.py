"""A delta in run-time form: two narrow matrices for each layer, the whole change of a text K/V projection, added vectors.

y = x W + s (x A) B (Hu et al. 2021, arXiv 2106.09685, eq. 3), alpha/rank folded in, float16. A change that is not narrow by
itself is cut to its largest singular values (Eckart and Young 1936); how much that loses is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from ..errors import RepositoryError
from .checkpoint import CheckpointWeights, ComponentWeights
from .deltas.edits import AppendedRows, Edit, Float
from .models import SECOND_ENCODER, TOKEN_EMBEDDING
from .tensorfile import TensorFile

Half = npt.NDArray[np.float16]
ENCODERS = ("text_encoder", SECOND_ENCODER)
DOWN, UP, CHANGE, ADDED = ".down", ".up", ".change", "added_vectors"
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
    """

    branches: Mapping[str, Mapping[str, Branch]] = field(default_factory=dict)
    changes: Mapping[str, Half] = field(default_factory=dict)
    added: Mapping[str, Half] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest of its layers'."""
        return max((branch.rank for layers in self.branches.values() for branch in layers.values()), default=0)

    def tensors(self) -> dict[str, Half]:
        """As they are named in the file."""
        found: dict[str, Half] = {}
        for component, layers in self.branches.items():
            for layer, branch in layers.items():
                found[f"{component}.{layer}{DOWN}"], found[f"{component}.{layer}{UP}"] = branch.down, branch.up
        found |= {f"unet.{layer}{CHANGE}": change for layer, change in self.changes.items()}
        return found | {f"{encoder}.{ADDED}": vectors for encoder, vectors in self.added.items()}

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
        if rest == ADDED:
            added[component] = _read(file, name)
        elif rest.endswith(CHANGE):
            changes[rest.removesuffix(CHANGE)] = _read(file, name)
        elif rest.endswith(DOWN) and f"{name.removesuffix(DOWN)}{UP}" in file.entries:
            layer = rest.removesuffix(DOWN)
            pair = _read(file, name), _read(file, f"{name.removesuffix(DOWN)}{UP}")
            branches.setdefault(component, {})[layer] = Branch(*pair)
        elif not (rest.endswith(UP) and f"{name.removesuffix(UP)}{DOWN}" in file.entries):
            raise RepositoryError(f"{path}: must hold pairs of {DOWN} and {UP}, got {name!r}; export the checkpoint again")
    return Adapter(branches, changes, added)


def _read(file: TensorFile, name: str) -> Half:
    array = file.read(name)
    if array.dtype != np.float16:
        raise RepositoryError(f"{file.path}: {name}: must be F16, got {array.dtype}; export the checkpoint again")
    return array


# --- from a delta


def adapter_of(weights: CheckpointWeights, rank: int = MOST_RANK, energy: float = ENERGY) -> Adapter:
    """The adapter of a checkpoint over its base. rank: the most a layer may have; energy: what is enough of a change's squares.

    Raises RepositoryError for a delta with NaN or Inf in it.
    """
    branches: dict[str, dict[str, Branch]] = {}
    changes, added = dict[str, Half](), dict[str, Half]()
    left_out: list[str] = []
    for component, models in weights.components.items():
        for name, edit in models.edits():
            layer = name.removesuffix(".weight")
            where = f"{component}.{name}"
            if name == TOKEN_EMBEDDING and isinstance(edit, AppendedRows):
                added[component] = _half(models.read(name)[edit.keep :], where)
            elif not (name.endswith(".weight") and len(models.shape(name)) in (2, 4)) or component == "vae":
                left_out.append(where)
            elif component == "unet" and layer.endswith(TEXT_ROWS) and edit.rank is None:
                changes[layer] = _half(_change(models, name, edit), where)
            else:
                branches.setdefault(component, {})[layer] = branch_of(models, name, edit, rank, energy)
    return Adapter(branches, changes, added, tuple(left_out))


def attachable(weights: CheckpointWeights) -> Iterator[str]:
    """Why the delta is not an adapter exactly: a line each; none where it is."""
    raise NotImplementedError
