"""Baselines: what a bundle measured when somebody looked at it and said yes, and how a later run compares.

One JSON file beside the repository, one entry per checkpoint and spec. Values are kept per golden input and picture, so
that a later run is compared pair by pair: a difference counts when the whole 95 % interval of the paired mean lies
beyond the metric's tolerance, on either side. Tolerances are measured, see `tolerances`.
"""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from personalq.atomic import write_atomic
from personalq.bundle import Manifest
from personalq.errors import BundleError
from personalq.spec import Spec

from .check import Check, none_of
from .interval import interval

FORMAT: Literal["personalq-gate-baseline"] = "personalq-gate-baseline"
LARGEST_DB = 60.0  # beyond, only the order of additions is measured
# What no run may be blamed for, by the metric's unit; see docs/gate.md for what CPUs were seen to differ by.
FLOORS = {"dB": 0.5, "SSIM": 0.01, "attention": 0.01, "judge": 0.01}
TIMES_NOISE = 3.0
LAYER_DB = 2.0  # a layer has moved when its own SNR fell by so much


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Metric(Frozen):
    """values: one per golden input or picture. interval: of their mean. tolerance: what two honest runs may differ by."""

    values: tuple[float, ...]
    interval: tuple[float, float]
    tolerance: float


class Entry(Frozen):
    """One bundle as it was accepted. layers: SNR dB at each layer and block, in graph order. decisions: layer -> types."""

    checkpoint_sha256: str
    spec_sha256: str
    prompts: tuple[str, ...]
    date: str
    machine: str
    versions: dict[str, str]
    metrics: dict[str, Metric]
    layers: dict[str, float]
    decisions: dict[str, str]


class Baselines(Frozen):
    format: Literal["personalq-gate-baseline"] = FORMAT
    schema_version: Literal[1] = 1
    bundles: dict[str, Entry] = {}


@dataclass(frozen=True)
class Comparison:
    """checks: one per metric. fell: (layer, before, now) of layers and blocks that lost more than LAYER_DB, in order."""

    checks: tuple[Check, ...]
    fell: tuple[tuple[str, float, float], ...] = ()


def default_file(repository: Path) -> Path:
    """Beside the repository: '<repository>.baselines.json'."""
    return repository.parent / f"{repository.name}.baselines.json"


def entry_name(manifest: Manifest) -> str:
    return f"{manifest.checkpoint.id}/{manifest.spec.name}"


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
    write_atomic(file, (json.dumps(new.model_dump(mode="json"), indent=1) + "\n").encode())


@dataclass(frozen=True)
class Measured:
    """What one run of the gate measured: metrics, SNR by layer, and the same metrics of runs that only noise tells apart."""

    metrics: Mapping[str, Sequence[float]]
    layers: Mapping[str, float]
    noisy: Sequence[Mapping[str, Sequence[float]]] = ()


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
        layers={name: round(value, 2) for name, value in measured.layers.items()},
        decisions=decisions(spec),
    )


def tolerances(measured: Measured) -> dict[str, float]:
    """Per metric: the unit's floor, or three times the largest paired mean change that noise alone made."""
    found = {}
    for name, values in measured.metrics.items():
        floor = next((value for unit, value in FLOORS.items() if unit in name), 0.01)
        changes = [abs(float(np.mean(_paired(values, noisy[name])))) for noisy in measured.noisy if name in noisy]
        found[name] = max([floor, *(TIMES_NOISE * change for change in changes)])
    return found


def compare(entry: Entry, manifest: Manifest, prompts: Sequence[str], measured: Measured) -> Comparison:
    """One check per metric of the baseline; a baseline of other weights or prompts is one failed check."""
    stale = []
    if entry.checkpoint_sha256 != manifest.checkpoint.sha256:
        stale = [f"{entry_name(manifest)}: the checkpoint's weights changed; look at it, then --update-baseline"]
    elif tuple(prompts) != entry.prompts:
        stale = [f"{entry_name(manifest)}: the goldens' prompts changed; look at them, then --update-baseline"]
    first = none_of("baseline is of these weights and prompts", stale)
    if stale:
        return Comparison((first,))
    checks = [first, *_compared(entry, measured)]
    fell = tuple(
        (name, entry.layers[name], now)
        for name, now in measured.layers.items()
        if name in entry.layers and min(now, LARGEST_DB) < min(entry.layers[name], LARGEST_DB) - LAYER_DB
    )
    return Comparison(tuple(checks), fell)


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
