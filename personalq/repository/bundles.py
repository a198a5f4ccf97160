"""The bundles in a repository and what each is: of a checkpoint, attached or merged, or a base's engine. Manifests as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import audit

Form = Literal["attached", "merged", "base"]
REFERENCES = ("fp32", "fp16")  # policies that quantise nothing: best only when there is no other
_FORMS: dict[str, Form] = {"adapter": "attached", "base": "base"}


@dataclass(frozen=True)
class BundleEntry:
    """owner: id of its checkpoint, of a base's engine the base's. base_sha256: of the base's weights alone; '' when merged.

    bytes: of all its files. policy: '' of an adapter, which has none.
    """

    folder: Path
    owner: str
    form: Form
    base_sha256: str
    bytes: int
    policy: str = ""

    @property
    def is_reference(self) -> bool:
        return self.policy in REFERENCES


@dataclass(frozen=True)
class Exports:
    """The bundles of one checkpoint, newest last. engines: of those that are attached -> the best engine of their base here."""

    bundles: tuple[BundleEntry, ...] = ()
    engines: Mapping[Path, BundleEntry] = field(default_factory=dict)

    @property
    def form(self) -> str:
        """Of what it is drawn with: quantised before unquantised, then the newest; '' without any."""
        ranked = sorted(self.bundles, key=self._rank)
        return ranked[-1].form if ranked else ""

    def _rank(self, one: BundleEntry) -> tuple[bool, bool]:
        """Whether it can be drawn with, and whether quantised; what ranks the same stays in order."""
        engine = one if one.form == "merged" else self.engines.get(one.folder)
        return engine is not None, engine is not None and not engine.is_reference

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: the form, the bundles' names, and what each is."""
        return {"form": self.form, "bundles": [one.folder.name for one in self.bundles], "exports": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """One JSON object a bundle. base_bundle: the engine that an adapter is attached to, '' when there is none here."""
        return [
            {"bundle": one.folder.name, "form": one.form, "bytes": one.bytes}
            | ({} if one.form == "merged" else {"base_bundle": _name(self.engines.get(one.folder))})
            for one in self.bundles
        ]


def _name(engine: BundleEntry | None) -> str:
    return "" if engine is None else engine.folder.name


def exports_by_id(root: Path) -> dict[str, Exports]:
    """Every checkpoint that was exported -> what to; a base's own engines are nobody's."""
    bundles = read_bundles(root)
    engines = {one.base_sha256: one for one in _best_last(bundles)}
    found: dict[str, list[BundleEntry]] = {}
    for one in bundles:
        if one.form != "base":
            found.setdefault(one.owner, []).append(one)
    return {
        owner: Exports(
            tuple(mine),
            {
                one.folder: engines[one.base_sha256]
                for one in mine
                if one.form == "attached" and one.base_sha256 in engines
            },
        )
        for owner, mine in found.items()
    }


def read_bundles(root: Path) -> list[BundleEntry]:
    """Every bundle with a manifest that can be read, newest last."""
    folders = sorted(audit.folders(root / "bundles"), key=lambda p: (audit.made_at(p), p.name))
    return [entry for folder in folders for entry in _entry(folder, audit.manifest(folder))]


def base_engines(bundles: list[BundleEntry], base_sha256: str) -> list[Path]:
    """The engines of a base's weights that adapters attach to, best last: quantised after unquantised, then the newest."""
    return [one.folder for one in _best_last(bundles) if one.base_sha256 == base_sha256]


def _best_last(bundles: list[BundleEntry]) -> list[BundleEntry]:
    return sorted((one for one in bundles if one.form == "base"), key=lambda one: not one.is_reference)


def _entry(folder: Path, manifest: Mapping[str, Any]) -> Iterator[BundleEntry]:
    checkpoint, parts, spec, files = (
        _object(manifest.get(name)) for name in ("checkpoint", "key_parts", "spec", "files")
    )
    if not isinstance(checkpoint.get("id"), str):
        return
    form = _FORMS.get(str(manifest.get("kind")), "merged")
    of_base = parts.get("weights") if form == "base" else manifest.get("base_sha256")
    sizes = [size for entry in files.values() if isinstance(size := _object(entry).get("bytes"), int)]
    yield BundleEntry(folder, checkpoint["id"], form, str(of_base or ""), sum(sizes), str(spec.get("policy", "")))


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
