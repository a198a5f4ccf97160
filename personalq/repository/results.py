"""What the repository answers with: plain values that print as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cards.card import Card
from .bundles import Exports

Report = Callable[[str, float | None], None]


def silent(_: str, __: float | None = None) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Whole:
    """A whole pipeline: a base with one checkpoint over it, or as it is (checkpoint_dir None; its card says only its id)."""

    card: Card
    base_dir: Path
    checkpoint_dir: Path | None = None

    @property
    def is_base(self) -> bool:
        return self.checkpoint_dir is None


@dataclass(frozen=True)
class Added:
    """One checkpoint that ``add`` took in."""

    id: str
    kind: str
    base: str
    trigger: tuple[str, ...]
    class_noun: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**self.__dict__, "trigger": list(self.trigger), "warnings": list(self.warnings)}


@dataclass(frozen=True)
class AddedBase:
    """One base that ``add_base`` took in."""

    id: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """One source that ``add`` did not take, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class AddResult:
    """What ``add`` did: every source is in one of the two lists."""

    added: tuple[Added, ...] = ()
    refused: tuple[Refused, ...] = ()

    def __add__(self, other: AddResult) -> AddResult:
        return AddResult(self.added + other.added, self.refused + other.refused)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"added": [a.to_json() for a in self.added], "refused": [r.__dict__ for r in self.refused]}


@dataclass(frozen=True)
class Entry:
    """One line of ``ls``: the card's main fields, whether there are weights, and what it was exported to."""

    card: Card
    has_weights: bool
    exports: Exports

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        main = self.card.model_dump(mode="json", include={"id", "kind", "base", "trigger", "class_noun"})
        bundles = [one.folder.name for one in self.exports.bundles]
        return {**main, "has_weights": self.has_weights, "form": self.exports.form, "bundles": bundles}
