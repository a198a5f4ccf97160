"""Random adapters for tests of a base's graphs: what the graphs are fed, and the same merged into torch's weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from personalq.bundle import BranchPlace

Array = np.ndarray[Any, np.dtype[Any]]
Places = Mapping[str, BranchPlace]


@dataclass(frozen=True)
class Matrices:
    """One layer's: Linear down (K,r), up (r,N); Conv2d down (r,C,kh,kw), up (N,r), as personalq.weights.adapter has them."""

    down: Array
    up: Array

    def change(self) -> Array:
        """What is added to the weight."""
        if self.down.ndim == 2:
            return (self.down @ self.up).T
        return np.einsum("nr,rchw->nchw", self.up, self.down)


def random_adapter(places: Places, layers: Iterable[str], rank: int, seed: int = 0) -> dict[str, Matrices]:
    """Changes of about the size of a weight of fan-in K."""
    random, made = np.random.default_rng(seed), {}
    for layer in layers:
        n, c, *kernel = places[layer].weight
        fan_in = c * int(np.prod(kernel))
        is_linear = places[layer].op == "linear"
        down = random.standard_normal((c, rank) if is_linear else (rank, c, *kernel)) * (0.5 / fan_in**0.5)
        up = random.standard_normal((rank, n) if is_linear else (n, rank)) / rank**0.5
        made[layer] = Matrices(down.astype(np.float32), up.astype(np.float32))
    return made


def branch_feed(
    places: Places, adapters: list[dict[str, Matrices]], strengths: list[float], *, is_wide: bool = False
) -> dict[str, Array]:
    """The inputs of a graph for one adapter, or one for each picture, whose ranks are equal; rank 0 where a layer has none."""
    feed: dict[str, Array] = {"adapter_strength": np.array(strengths, np.float32)}
    for layer, place in places.items():
        if place.is_wide and not is_wide:
            assert all(layer not in adapter for adapter in adapters), layer
            continue
        n, c, *kernel = place.weight
        if place.op == "linear":
            nothing = Matrices(np.zeros((c, 0), np.float32), np.zeros((0, n), np.float32))
        else:
            nothing = Matrices(np.zeros((0, c, *kernel), np.float32), np.zeros((n, 0), np.float32))
        each = [adapter.get(layer, nothing) for adapter in adapters]
        down = np.stack([one.down for one in each])
        if place.op == "conv":
            down = down.reshape(down.shape[:3]) if kernel == [1, 1] else down[0]
        feed[f"{layer}.down"], feed[f"{layer}.up"] = down, np.stack([one.up for one in each])
    return feed


def merge_(module: Any, adapter: Mapping[str, Matrices], strength: float) -> None:
    """Add the changes to a torch module's weights."""
    import torch

    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for layer, one in adapter.items():
            parameters[f"{layer}.weight"] += strength * torch.from_numpy(one.change())
