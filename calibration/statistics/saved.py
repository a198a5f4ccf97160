"""Statistics on disk: the results of one pass over a checkpoint, for the next policy to reuse (`specs/<id>/statistics`).

Safetensors (histograms, attention mass, sensitivity points) with a JSON header (moments, and the key of what produced
them). A file for another checkpoint, prompts, steps or seed is ignored and overwritten.
"""

import hashlib
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from personalq.repository.atomic import write_atomic

from ..blob import same_bytes
from ..model.pipeline import quantisable_layers
from .histogram import Histogram
from .ranges import N_TIME_BINS, LayerRanges
from .sensitivity import Points
from .text_rows import Moments, RowStatistics

VERSION = "3"
NAME = "statistics.safetensors"


def statistics_key(checkpoint_sha256: str, recipe: Any) -> str:
    """Hash of everything the statistics depend on."""
    content = [VERSION, N_TIME_BINS, checkpoint_sha256, asdict(recipe)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_observation(
    path: Path, key: str, layers: dict[str, LayerRanges], rows: RowStatistics, points: Points, samples: int
) -> None:
    """Write one observation atomically."""
    tensors: dict[str, np.ndarray] = {"mass": rows.mass, "mass_count": rows.mass_count}
    for name, layer in layers.items():
        tensors[f"{name}.channels"] = layer.channel_absmax
        for part in ("inputs", "outputs") if layer.op == "conv" else ("inputs",):
            histograms: list[Histogram] = getattr(layer, part)
            tensors[f"{name}.{part}"] = np.stack([h.counts for h in histograms]).astype(np.float32)
            tensors[f"{name}.{part}.range"] = np.array([[h.limit, h.absmax] for h in histograms])
    for field in fields(points):
        tensors[f"points.{field.name}"] = getattr(points, field.name).numpy()
    moments = {"|".join(name): _numbers(m) for name, m in rows.moments.items()}
    header = {"key": key, "samples": str(samples), "moments": json.dumps(moments), "counts": json.dumps(rows.counts)}
    write_atomic(path, same_bytes(tensors, header))


def load_observation(
    path: Path, key: str, unet: nn.Module, rows: RowStatistics
) -> tuple[dict[str, LayerRanges], Points, int] | None:
    """What was saved under `key` (filling `rows`), or None when there is nothing of that key."""
    if not path.is_file():
        return None
    with safe_open(str(path), framework="numpy") as file:
        header = file.metadata() or {}
        if header.get("key") != key:
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    rows.mass, rows.mass_count = tensors["mass"], tensors["mass_count"]
    rows.counts = json.loads(header["counts"])
    for name, numbers in json.loads(header["moments"]).items():
        kind, layer_name, part = name.split("|")
        rows.moments[kind, layer_name, part] = Moments(**numbers | {"sums": np.array(numbers["sums"])})
    layers = {}
    for name, module in quantisable_layers(unet).items():
        layer = replace(LayerRanges.of(module), channel_absmax=tensors[f"{name}.channels"])
        for part in ("inputs", "outputs") if layer.op == "conv" else ("inputs",):
            counts, ranges = tensors[f"{name}.{part}"], tensors[f"{name}.{part}.range"]
            setattr(
                layer,
                part,
                [Histogram(c.astype(np.float64), *map(float, r)) for c, r in zip(counts, ranges, strict=True)],
            )
        layers[name] = layer
    points = Points(*(torch.from_numpy(tensors[f"points.{field.name}"]) for field in fields(Points)))
    return layers, points, int(header["samples"])


def _numbers(moments: Moments) -> dict[str, Any]:
    return {**asdict(moments), "sums": moments.sums.tolist()}
