"""Adapters as the graphs of a base take them: arrays by input name, made once per picture. Knows shapes, not files or prompts.

y = x W + strength (x down) up, for each layer with a branch; several adapters are one of their summed rank, strengths
multiplied into `up`. A layer that no adapter changes gets matrices of rank 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

from personalq.bundle import ADDED_VECTORS, DOWN, STRENGTH, UP, AdapterInputs, BranchPlace
from personalq.errors import EngineError
from personalq.rows import RowLayer, packed_width
from personalq.weights.adapter import TEXT_ROWS, Adapter, Branch

Array = npt.NDArray[np.float32]
Feed = dict[str, Array]
Padded = dict[str, npt.NDArray[np.floating]]


@dataclass(frozen=True)
class Worn:
    """An adapter and its strengths: in the UNet (and in K and V of the text), and in the text encoders."""

    adapter: Adapter
    strength: float = 1.0
    text_strength: float = 1.0

    def of(self, graph: str) -> float:
        """Its strength in one graph."""
        return self.strength if graph == "unet" else self.text_strength


@dataclass(frozen=True)
class Pair:
    """One layer's input arrays. Linear: (A,K,r), (A,r,N); 1x1 Conv: (A,r,C), (A,N,r); kxk Conv: (r,C,kh,kw), (1,N,r)."""

    down: Array
    up: Array


@dataclass(frozen=True)
class RowsChange:
    """What K or V of one layer's text gains: embeds (B,T,C) @ down (C,r) @ up (r,N); up None: down is (C,N)."""

    down: Array
    up: Array | None = None

    def of(self, embeds: Array) -> Array:
        first: Array = embeds @ self.down
        return first if self.up is None else np.asarray(first @ self.up, np.float32)


@dataclass(frozen=True)
class Attached:
    """What is attached to one base. pairs: graph -> layer; strength: graph -> (A,); rows: layer of K or V -> its changes.

    added: text encoder -> (n, C), vectors of the added tokens. is_wide: the UNet must be the graph with every branch.
    """

    pairs: Mapping[str, Mapping[str, Pair]] = field(default_factory=dict)
    strength: Mapping[str, Array] = field(default_factory=dict)
    rows: Mapping[str, Sequence[RowsChange]] = field(default_factory=dict)
    added: Mapping[str, Array] = field(default_factory=dict)
    is_wide: bool = False

    def feed(self, inputs: AdapterInputs | None, graph: str, width: int = 0, *, is_wide: bool = False) -> Feed:
        """Every adapter input of one graph, by name. width: of the text encoder's vectors. {} where a graph takes none."""
        if inputs is None:
            return {}
        mine = self.pairs.get(graph, {})
        made: Feed = {STRENGTH: self.strength.get(graph, np.ones(1, np.float32))}
        for layer, place in inputs.branches.get(graph, {}).items():
            if place.is_wide and not is_wide:
                continue
            pair = mine.get(layer) or _nothing(place.op, place.weight)
            made[f"{layer}{DOWN}"], made[f"{layer}{UP}"] = pair.down, pair.up
        if graph != "unet":
            made[ADDED_VECTORS] = self.added.get(graph, np.zeros((1, width), np.float32))
        return made

    def rank(self, inputs: AdapterInputs) -> int:
        """The largest of the layers' in the UNet; 0 when nothing of it changes."""
        places = inputs.branches["unet"]
        pairs = self.pairs.get("unet", {}).items()
        return max((pair.up.shape[1 if places[layer].op == "linear" else 2] for layer, pair in pairs), default=0)

    def padded(self, inputs: AdapterInputs, rank: int, batch: int, dtype: npt.DTypeLike = np.float16) -> Padded:
        """The UNet's adapter inputs as a graph of one rank takes them: `batch` adapters, filled up with zeros along the rank.

        One adapter is repeated. Raises EngineError for another number of them, and for a value that `dtype` cannot hold.
        """
        given = self.feed(inputs, "unet")
        made: Padded = {STRENGTH: _filled_up(STRENGTH, given[STRENGTH], (batch,), dtype)}
        for layer, place in inputs.branches["unet"].items():
            if place.is_wide:
                continue
            n, k = place.weight[:2]
            down, up = ((k, rank), (rank, n)) if place.op == "linear" else ((rank, k), (n, rank))
            for name, sides in ((f"{layer}{DOWN}", down), (f"{layer}{UP}", up)):
                made[name] = _filled_up(name, given[name], (batch, *sides), dtype)
        return made

    def added_rows(self, embeds: Array, layers: Sequence[RowLayer]) -> Array:
        """embeds (B,T,C) -> what K and V gain, (B,T,R); zeros (1,1,R) when nothing changes them."""
        if not self.rows:
            return np.zeros((1, 1, packed_width(layers)), np.float32)
        made = np.zeros((*embeds.shape[:2], packed_width(layers)), np.float32)
        for layer in layers:
            for start, kind in zip((layer.offset, layer.offset + layer.width), ("to_k", "to_v"), strict=True):
                for change in self.rows.get(f"{layer.name}.{kind}", ()):
                    made[:, :, start : start + layer.width] += change.of(embeds)
        return made


PLAIN = Attached()


def without_place(inputs: AdapterInputs, adapter: Adapter) -> list[str]:
    """'graph.layer' of a text encoder, for each layer of an adapter that the graph lacks: of SDXL's, what no output needs."""
    return [
        f"{graph}.{layer}"
        for graph, layers in adapter.branches.items()
        for layer in layers
        if graph != "unet" and layer not in inputs.branches.get(graph, {})
    ]


def attach(inputs: AdapterInputs, worn: Sequence[Worn]) -> Attached:
    """Adapters over one base: they stack, ranks one after the other; what is `without_place` is left out.

    Raises EngineError for a layer of the UNet that has no place there, and for matrices of another shape.
    """
    pairs: dict[str, dict[str, Pair]] = {}
    rows: dict[str, list[RowsChange]] = {}
    strength: dict[str, Array] = {}
    is_one = len(worn) == 1 and not worn[0].adapter.correction
    for graph in ("unet", *(name for name in inputs.branches if name != "unet")):
        parts: dict[str, list[tuple[Branch, float]]] = {}
        for one in worn:
            own = 1.0 if is_one else one.of(graph)
            for layer, branch in one.adapter.branches.get(graph, {}).items():
                if graph == "unet" and layer.endswith(TEXT_ROWS):
                    rows.setdefault(layer, []).append(_rows_change(branch, one.strength))
                else:
                    parts.setdefault(layer, []).append((branch, own))
            for layer, branch in one.adapter.correction.items() if graph == "unet" else ():
                parts.setdefault(layer, []).append((branch, 1.0))
        places = inputs.branches.get(graph, {})
        pairs[graph] = {
            layer: _pair(f"{graph}.{layer}", found, places.get(layer))
            for layer, found in parts.items()
            if graph == "unet" or layer in places
        }
        strength[graph] = np.array([worn[0].of(graph) if is_one and worn else 1.0], np.float32)
    for one in worn:
        for layer, change in one.adapter.changes.items():
            rows.setdefault(layer, []).append(RowsChange(np.float32(one.strength) * change.T.astype(np.float32)))
    added = {name: _added(name, worn) for name in {name for one in worn for name in one.adapter.added}}
    is_wide = any(inputs.branches["unet"][layer].is_wide for layer in pairs["unet"])
    return Attached(pairs, strength, rows, added, is_wide)


def side_by_side(each: Sequence[Attached], inputs: AdapterInputs) -> Attached:
    """A batch of len(each) pictures, each with what is attached to it, in its UNet: ranks are filled up with zeros.

    Raises EngineError where one changes k x k convolutions, which take one adapter for a whole batch.
    """
    places, pairs = inputs.branches["unet"], dict[str, Pair]()
    for layer in sorted({layer for one in each for layer in one.pairs.get("unet", {})}):
        if len(places[layer].weight) == 4 and tuple(places[layer].weight[2:]) != (1, 1):
            raise EngineError(
                f"unet.{layer}: pictures of one batch must share an adapter of it; draw them one after the other"
            )
        found = [
            one.pairs.get("unet", {}).get(layer) or _nothing(places[layer].op, places[layer].weight) for one in each
        ]
        pairs[layer] = Pair(_filled([pair.down for pair in found]), _filled([pair.up for pair in found]))
    strengths = [one.strength.get("unet", np.ones(1, np.float32)) for one in each]
    return Attached({"unet": pairs}, {"unet": np.concatenate(strengths)}, is_wide=any(one.is_wide for one in each))


def _filled_up(name: str, value: Array, sides: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.floating]:
    """A value in the corner of zeros of these sides, the first of which it has, or has once."""
    if len(value) not in (1, sides[0]):
        raise EngineError(
            f"unet.{name}: adapters must be one, or one for each of {sides[0]} rows, got {len(value)}; draw the pictures apart"
        )
    made: npt.NDArray[np.floating] = np.zeros(sides, dtype)
    with np.errstate(over="ignore"):
        made[(slice(None), *(slice(side) for side in value.shape[1:]))] = value
    if not np.isfinite(made).all():
        largest = float(np.abs(value).max())
        raise EngineError(f"unet.{name}: must fit {made.dtype}, got {largest:.3g}; lower the strength")
    return made


def _filled(arrays: Sequence[Array]) -> Array:
    """(1, a, b) each -> (A, most a, most b), zeros where one is smaller: only the rank differs."""
    sides = np.max([array.shape[1:] for array in arrays], axis=0)
    made = np.zeros((len(arrays), *sides), np.float32)
    for i, array in enumerate(arrays):
        made[i, : array.shape[1], : array.shape[2]] = array[0]
    return made


def _pair(where: str, parts: Sequence[tuple[Branch, float]], place: BranchPlace | None) -> Pair:
    """The branches of one layer, one after the other along the rank."""
    if place is None:
        raise EngineError(f"{where}: must be a layer whose graph takes an adapter, got none; export the base again")
    for branch, _ in parts:
        wanted, found = tuple(place.weight), branch.weight_shape
        if wanted != found:
            raise EngineError(
                f"{where}: the adapter must fit {list(wanted)}, got {list(found)}; it is of another family"
            )
    downs = [branch.down.astype(np.float32) for branch, _ in parts]
    ups = [branch.up.astype(np.float32) if by == 1 else np.float32(by) * branch.up for branch, by in parts]
    if place.op == "linear":
        return Pair(_joined(downs, 1)[None], _joined(ups, 0)[None])
    down, up = _joined(downs, 0), _joined(ups, 1)[None]
    return Pair(down.reshape(1, len(down), -1) if down.shape[2:] == (1, 1) else down, up)


def _joined(arrays: Sequence[Array], axis: int) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=axis)


def _rows_change(branch: Branch, strength: float) -> RowsChange:
    return RowsChange(branch.down.astype(np.float32), np.float32(strength) * branch.up.astype(np.float32))


def _added(encoder: str, worn: Sequence[Worn]) -> Array:
    vectors = [one.adapter.added[encoder].astype(np.float32) for one in worn if encoder in one.adapter.added]
    return np.concatenate(vectors)


@cache
def _nothing(op: str, weight: tuple[int, ...]) -> Pair:
    """A branch of rank 0; of rank 1, all zeros, for a k x k convolution, which needs an output."""
    n, k = weight[:2]
    if op == "linear":
        return Pair(np.zeros((1, k, 0), np.float32), np.zeros((1, 0, n), np.float32))
    if tuple(weight[2:]) == (1, 1):
        return Pair(np.zeros((1, 0, k), np.float32), np.zeros((1, n, 0), np.float32))
    return Pair(np.zeros((1, *weight[1:]), np.float32), np.zeros((1, n, 1), np.float32))
