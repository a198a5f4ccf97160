"""The gate's results: checks with their limits, the report of a bundle, the wording of a failure. It measures nothing."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import PersonalQError

LARGEST_DB = 200.0  # stands for "equal": JSON has no infinity


@dataclass(frozen=True)
class Check:
    """One number and its limit. reason: why it failed, where the number alone does not say. layer: who is to blame."""

    name: str
    value: float
    limit: float
    passed: bool
    reason: str = ""
    level: str = ""
    layer: str = ""
    interval: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"name": self.name, "value": self.value, "limit": self.limit, "passed": self.passed}
        row["level"] = self.level
        optional = {"reason": self.reason, "layer": self.layer, "interval": self.interval}
        return row | {key: value for key, value in optional.items() if value}


@dataclass(frozen=True)
class Pictures:
    """Pairs drawn from the same start noise, uint8 (N,H,W,3), with a caption each: for the reports."""

    reference: npt.NDArray[np.uint8]
    drawn: npt.NDArray[np.uint8]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Every check of one bundle; passed when all of them did. headline: the first line of every report.

    measured: per metric, one value per golden input or picture. layers: SNR in dB at each sampled layer and block, mean
    over golden inputs, in the order the graph computes them; before: the same of the baseline. seconds: by level.
    left_out: what could not be compared because it was not there to compare with. form: 'merged', 'base', or 'attached': to
    `bundle`, its base's, with `adapter`.
    """

    bundle: Path
    checks: tuple[Check, ...] = ()
    subject: str = ""
    headline: str = ""
    measured: dict[str, list[float]] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    pictures: Pictures | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    form: str = "merged"
    adapter: Path | None = None

    @property
    def described(self) -> str:
        """Which files were judged, in words."""
        if self.adapter is not None:
            return f"attached: adapter {self.adapter.name} to base bundle {self.bundle.name}"
        return f"{'base bundle' if self.form == 'base' else 'bundle'} {self.bundle.name}"

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "headline": self.headline,
            "form": self.form,
            "checks": [check.to_json() for check in self.checks],
            "left_out": list(self.left_out),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            **({} if self.adapter is None else {"adapter": str(self.adapter)}),
        }


def at_least(name: str, value: float, limit: float, **more: Any) -> Check:
    return Check(name, min(float(value), LARGEST_DB), float(limit), bool(value >= limit), **more)


def at_most(name: str, value: float, limit: float, **more: Any) -> Check:
    return Check(name, float(value), float(limit), bool(value <= limit), **more)


def equal(name: str, value: float, limit: float, **more: Any) -> Check:
    return Check(name, value, limit, value == limit, **more)


def none_of(name: str, problems: list[str], layer: str = "") -> Check:
    """A check that counts problems and reports the first one."""
    first = problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "") if problems else ""
    return Check(name, len(problems), 0, not problems, first, layer=layer)


def failed(name: str, reason: str) -> Check:
    return Check(name, 0, 0, False, reason)


def reason_of(error: Exception) -> str:
    """The first line of an error, with its class where it is not one of ours."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return text if isinstance(error, PersonalQError) else f"{type(error).__name__}: {text}"


def headline(subject: str, checks: tuple[Check, ...]) -> str:
    """One line: passed, or the first failure that names a layer, or the first failure."""
    wrong = [check for check in checks if not check.passed]
    if not wrong:
        return f"PASSED {subject}: {len(checks)} checks"
    first = next((check for check in wrong if check.layer), wrong[0])
    why = f": {first.reason}" if first.reason else f": {first.value:.4g}, limit {first.limit:.4g}"
    return f"FAILED {subject}: {first.name}{why} ({len(wrong)} of {len(checks)} checks failed)"
