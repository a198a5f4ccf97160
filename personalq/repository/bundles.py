"""The bundles in a repository and what each is: of a checkpoint, attached or merged, or a base's engine. Manifests as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import audit

Form = Literal["attached", "merged", "base"]
_FORMS: dict[str, Form] = {"adapter": "attached", "base": "base"}


@dataclass(frozen=True)
class BundleEntry:
    """owner: id of its checkpoint, of a base's engine the base's. base_sha256: of the base's weights alone; '' when merged.

    bytes: of all its files.
    """

    folder: Path
    owner: str
    form: Form
    base_sha256: str
    bytes: int


@dataclass(frozen=True)
class Exports:
    """The bundles of one checkpoint, newest last. engines: of those that are attached -> the newest engine of their base here."""

    bundles: tuple[BundleEntry, ...] = ()
    engines: Mapping[Path, Path] = field(default_factory=dict)

    @property
    def form(self) -> str:
        """Of the newest that can be drawn with, else of the newest; '' without any."""
        drawable = [one for one in self.bundles if one.form == "merged" or one.folder in self.engines]
        return (drawable or self.bundles)[-1].form if self.bundles else ""

    def rows(self) -> list[dict[str, Any]]:
        """One JSON object a bundle. base_bundle: the engine that an adapter is attached to, '' when there is none here."""
        return [
            {"bundle": one.folder.name, "form": one.form, "bytes": one.bytes}
            | ({} if one.form == "merged" else {"base_bundle": name_of(self.engines.get(one.folder))})
            for one in self.bundles
        ]


def name_of(folder: Path | None) -> str:
    return "" if folder is None else folder.name


def exports_by_id(root: Path) -> dict[str, Exports]:
    """Every checkpoint that was exported -> what to; a base's own engines are nobody's."""
    bundles = read_bundles(root)
    engines = {one.base_sha256: one.folder for one in bundles if one.form == "base"}
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
    """The engines of a base's weights that adapters attach to, newest last."""
    return [one.folder for one in bundles if one.form == "base" and one.base_sha256 == base_sha256]


def _entry(folder: Path, manifest: Mapping[str, Any]) -> Iterator[BundleEntry]:
    checkpoint, parts, files = (manifest.get(name) for name in ("checkpoint", "key_parts", "files"))
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("id"), str):
        return
    form = _FORMS.get(str(manifest.get("kind")), "merged")
    of_base = parts.get("weights") if form == "base" and isinstance(parts, dict) else manifest.get("base_sha256")
    sizes = (
        [entry.get("bytes") for entry in files.values() if isinstance(entry, dict)] if isinstance(files, dict) else []
    )
    yield BundleEntry(
        folder, checkpoint["id"], form, str(of_base or ""), sum(size for size in sizes if isinstance(size, int))
    )
