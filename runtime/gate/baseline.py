"""Baselines: what a bundle measured when somebody accepted it, and how a later run compares.

One JSON file beside the repository, one entry per checkpoint and spec. Values are kept per golden input and picture, so
that a later run is compared pair by pair: a difference counts when the whole 95 % interval of the paired mean lies
beyond the metric's tolerance, on either side. So are the layers: one of them can get much worse without the noise
prediction, where the errors of all add up, moving at all. Tolerances are measured, see `tolerances`.
"""

import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from personalq.bundle import Manifest
from personalq.errors import BundleError
from personalq.repository.atomic import write_atomic
from personalq.spec import Spec

from .check import Check, none_of
from .interval import interval

FORMAT: Literal["personalq-gate-baseline"] = "personalq-gate-baseline"
LARGEST_DB = 60.0  # beyond, only the order of additions is measured
# What no run may be blamed for, by the metric's unit; see docs/gate.md for what CPUs were seen to differ by.
FLOORS = {"dB": 0.5, "SSIM": 0.01, "attention": 0.01, "judge": 0.01}
TIMES_NOISE = 3.0
# Layers: no interval of the gallery's layers was further than 1.9 dB from zero in 18 nudged runs of three checkpoints, none
# of a layer at 4 bits nearer than 3.4 dB; an emulated CPU without AVX-512 moved no mean by more than 0.5 dB.
LAYER_DB, TIMES_LAYER_NOISE = 2.5, 1.5
LAYERS = "layers and blocks SNR dB, beside the baseline"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Metric(Frozen):
    """values: one per golden input or picture. interval: of their mean. tolerance: what two honest runs may differ by."""

    values: tuple[float, ...]
    interval: tuple[float, float]
    tolerance: float


class Entry(Frozen):
    """One bundle as it was accepted. layers: SNR dB at each layer and block for each golden input, in graph order.

    layer_tolerance: dB that a layer may move by. decisions: layer -> types.
    """

    checkpoint_sha256: str
    spec_sha256: str
    prompts: tuple[str, ...]
    date: str
    machine: str
    versions: dict[str, str]
    metrics: dict[str, Metric]
    layers: dict[str, tuple[float, ...]]
    layer_tolerance: float
    decisions: dict[str, str]


class Baselines(Frozen):
    format: Literal["personalq-gate-baseline"] = FORMAT
    schema_version: Literal[2] = 2
    bundles: dict[str, Entry] = {}


@dataclass(frozen=True)
class Moved:
    """A layer or block whose SNR is another than the baseline's: means in dB, before and now."""

    layer: str
    before: float
    now: float


@dataclass(frozen=True)
class Comparison:
    """checks: one per metric, one of all layers. moved: layers, then blocks, each in the order they are computed."""

    checks: tuple[Check, ...]
    moved: tuple[Moved, ...] = ()


def default_file(repository: Path) -> Path:
    """Beside the repository: '<repository>.baselines.json'."""
    return repository.parent / f"{repository.name}.baselines.json"


def entry_name(manifest: Manifest) -> str:
    """Of a checkpoint's bundle, or of one that is attached to a base's (its manifest as the pictures see it)."""
    is_attached = manifest.kind == "base" and manifest.checkpoint.id != manifest.checkpoint.base
    return f"{manifest.checkpoint.id}/{manifest.spec.name}{'-attached' if is_attached else ''}"


def read_baselines(file: Path) -> Baselines:
    """Read and validate a file. Raises BundleError naming the field."""
    try:
        return Baselines.model_validate_json(file.read_text())
    except FileNotFoundError:
        raise BundleError(
            f"{file}: no such baselines; write them with 'personalq verify ID --update-baseline'"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "file"
        raise BundleError(f"{file}: {field}: {first['msg']}; write it again with --update-baseline") from error


def update(file: Path, name: str, entry: Entry) -> None:
    """Put one entry in, keep the others, write atomically."""
    old = read_baselines(file).bundles if file.is_file() else {}
    new = Baselines(bundles=dict(sorted({**old, name: entry}.items())))
    text = json.dumps(new.model_dump(mode="json"), indent=1)
    write_atomic(file, (_NUMBERS.sub(lambda found: " ".join(found.group().split()), text) + "\n").encode())


_NUMBERS = re.compile(r"\[[-+.\deE,\s]+\]")  # a list of numbers: one line of the file


@dataclass(frozen=True)
class Measured:
    """What one run of the gate measured: metrics and SNR by layer, and what runs that only noise tells apart did."""

    metrics: Mapping[str, Sequence[float]]
    layers: Mapping[str, Sequence[float]]
    noisy: Sequence["Measured"] = ()


def make_entry(manifest: Manifest, spec: Spec, prompts: Sequence[str], measured: Measured) -> Entry:
    """The entry of a bundle that somebody accepts."""
    tolerance = tolerances(measured)
    metrics = {
        name: Metric(
            values=tuple(round(float(value), 4) for value in values),
            interval=_rounded(interval(values)),
            tolerance=round(tolerance[name], 4),
        )
        for name, values in measured.metrics.items()
    }
    return Entry(
        checkpoint_sha256=manifest.checkpoint.sha256,
        spec_sha256=manifest.spec.sha256,
        prompts=tuple(prompts),
        date=date.today().isoformat(),
        machine=f"{platform.machine()} {platform.system()}",
        versions={name: _version(name) for name in ("personalq", "onnxruntime", "numpy")},
        metrics=metrics,
        layers={name: tuple(round(value, 2) for value in values) for name, values in measured.layers.items()},
        layer_tolerance=round(layer_tolerance(measured), 2),
        decisions=decisions(spec),
    )


def tolerances(measured: Measured) -> dict[str, float]:
    """Per metric: the unit's floor, or three times the largest paired mean change that noise alone made."""
    found = {}
    for name, values in measured.metrics.items():
        floor = next((value for unit, value in FLOORS.items() if unit in name), 0.01)
        noisy = [run.metrics[name] for run in measured.noisy if name in run.metrics]
        changes = [abs(float(np.mean(_paired(values, other)))) for other in noisy]
        found[name] = max([floor, *(TIMES_NOISE * change for change in changes)])
    return found


def layer_tolerance(measured: Measured) -> float:
    """LAYER_DB, or half as far again as noise alone moved the interval of any layer."""
    moved = [
        _beyond(_paired(values, run.layers[name])) for run in measured.noisy for name, values in measured.layers.items()
    ]
    return max([LAYER_DB, *(TIMES_LAYER_NOISE * distance for distance in moved)])


def compare(entry: Entry, manifest: Manifest, prompts: Sequence[str], measured: Measured) -> Comparison:
    """One check per metric of the baseline, one of all layers; a baseline of other weights or prompts is one failed check."""
    stale = []
    if entry.checkpoint_sha256 != manifest.checkpoint.sha256:
        stale = [f"{entry_name(manifest)}: the checkpoint's weights changed; look at it, then --update-baseline"]
    elif tuple(prompts) != entry.prompts:
        stale = [f"{entry_name(manifest)}: the goldens' prompts changed; look at them, then --update-baseline"]
    first = none_of("baseline is of these weights and prompts", stale)
    if stale:
        return Comparison((first,))
    beyond = {
        name: _beyond(_paired(entry.layers[name], now)) for name, now in measured.layers.items() if name in entry.layers
    }
    moved = [
        Moved(name, float(np.mean(entry.layers[name])), float(np.mean(measured.layers[name])))
        for name, distance in beyond.items()
        if distance > entry.layer_tolerance
    ]
    return Comparison((first, *_compared(entry, measured), *_layers_check(entry, beyond, moved)), tuple(moved))


def _layers_check(entry: Entry, beyond: Mapping[str, float], moved: Sequence[Moved]) -> list[Check]:
    if not beyond:
        return []
    reason = ""
    if moved:
        others = f", and {len(moved) - 1} more" if len(moved) > 1 else ""
        reason = f"{moved[0].layer}: {moved[0].before:.1f} -> {moved[0].now:.1f} dB at its output{others}"
    return [Check(LAYERS, max(beyond.values()), entry.layer_tolerance, not moved, reason)]


def _compared(entry: Entry, measured: Measured) -> Iterator[Check]:
    for name, before in entry.metrics.items():
        label = f"{name}, beside the baseline"
        now = measured.metrics.get(name)
        if now is None:
            continue  # measured only when asked for: a judge, more pictures
        changes = _paired(before.values, now)
        low, high = interval(changes)
        passed = low <= before.tolerance and high >= -before.tolerance
        way = "" if passed else _way(name, low > before.tolerance)
        yield Check(label, float(np.mean(changes)), before.tolerance, passed, way, interval=(low, high))


def _way(name: str, larger: bool) -> str:
    better = larger != name.startswith("attention")
    return "better than the baseline: another export than the accepted one" if better else "worse than the baseline"


def _paired(before: Sequence[float], now: Sequence[float]) -> list[float]:
    """now - before, value by value, of those both have; decibels beyond what can be told apart count as equal."""
    return [min(b, LARGEST_DB) - min(a, LARGEST_DB) for a, b in zip(before, now, strict=False)]


def _beyond(changes: Sequence[float]) -> float:
    """How far the interval of the mean change is from zero, either way; negative when zero is in it."""
    low, high = interval(changes)
    return max(low, -high)


def decisions(spec: Spec) -> dict[str, str]:
    """Layer -> 'weight/activation'."""
    return {name: f"{layer.weight}/{layer.activation}" for name, layer in spec.layers.items()}


def _rounded(pair: tuple[float, float]) -> tuple[float, float]:
    return round(pair[0], 4), round(pair[1], 4)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
