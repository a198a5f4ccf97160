"""Find what is wrong in a repository folder: half-written leftovers, broken cards, changed files. Repairs only orphans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cards.card import MAX_CARD_BYTES, Card, folder_name, parse_card
from ..errors import CardError
from .atomic import is_orphan, is_temporary, remove
from .sharing import dangling

_ROOMS = ("", "bases", "checkpoints", "specs", "families", "bundles", "shared", "index")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: ``kind`` is orphan, card, missing, changed or manifest."""

    kind: str
    path: str
    message: str
    fixed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def check(root: Path, *, fix: bool) -> list[Problem]:
    """Return every problem under ``root``; ``fix`` removes orphans."""
    wrong = (
        _orphans(root, fix=fix),
        _unused(root, fix=fix),
        _cards(root),
        _recorded(root),
        _bundles(root),
        _attached(root),
    )
    return [problem for problems in wrong for problem in problems]


def _orphans(root: Path, *, fix: bool) -> Iterator[Problem]:
    places = [root / room for room in _ROOMS]
    places += [folder for room in ("bases", "checkpoints", "bundles", "specs") for folder in folders(root / room)]
    places += [folder / "engines" for folder in folders(root / "bundles")]
    for entry in (e for place in places if place.is_dir() for e in sorted(place.iterdir()) if is_temporary(e)):
        if not is_orphan(entry):
            continue
        if fix:
            remove(entry)
        done = "removed" if fix else "remove it with 'personalq check --fix'"
        yield Problem("orphan", str(entry), f"{entry}: half-written, its writer is gone; {done}", fixed=fix)


def _unused(root: Path, *, fix: bool) -> Iterator[Problem]:
    for note in list(dangling(root)):
        if fix:
            note.unlink(missing_ok=True)
        done = "removed" if fix else "remove it with 'personalq check --fix'"
        yield Problem("orphan", str(note), f"{note}: leads to no bundle any more; {done}", fixed=fix)


def _cards(root: Path) -> Iterator[Problem]:
    for folder in folders(root / "checkpoints"):
        card = folder_card(folder)
        if isinstance(card, CardError):
            yield Problem("card", str(folder / "card.json"), str(card))
        elif folder_name(card.id) != folder.name:
            yield Problem(
                "card", str(folder), f"{folder}: must be named {folder_name(card.id)!r} after its card; rename it"
            )
    listed = root / "checkpoints" / "cards.jsonl"
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines() if listed.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            parse_card(line, where=f"{listed}:{number}")
        except CardError as error:
            yield Problem("card", str(listed), str(error))


def _recorded(root: Path) -> Iterator[Problem]:
    """Compare every checkpoint file with the hash taken when it was added."""
    for folder in folders(root / "checkpoints"):
        if (folder / "added.json").is_file():
            record = _json_object(folder / "added.json").get("files")
            yield from _files(folder, record, "add it again")


def _bundles(root: Path) -> Iterator[Problem]:
    for folder in folders(root / "bundles"):
        yield from _files(folder, manifest(folder).get("files"), "export it again")


def _attached(root: Path) -> Iterator[Problem]:
    """Adapters whose base has no engine here: they cannot be drawn with."""
    found = {folder: manifest(folder) for folder in folders(root / "bundles")}
    engines = {str(_object(one.get("key_parts")).get("weights")) for one in found.values() if one.get("kind") == "base"}
    for folder, one in found.items():
        if one.get("kind") == "adapter" and str(one.get("base_sha256")) not in engines:
            base = str(_object(one.get("checkpoint")).get("base"))[:80]
            cure = f"run 'personalq calibrate --base {base}' and 'personalq export --base {base}'"
            yield Problem("missing", str(folder), f"{folder}: its base must have an engine here, got none; {cure}")


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _files(folder: Path, record: object, cure: str) -> Iterator[Problem]:
    if not isinstance(record, dict):
        yield Problem("manifest", str(folder), f"{folder}: must list its files, got no readable manifest; {cure}")
        return
    for name, entry in sorted(record.items()):
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not isinstance(entry, dict):
            yield Problem(
                "manifest", str(folder), f"{folder}: must list files inside itself, got {name[:80]!r}; {cure}"
            )
        elif not file.is_file():
            yield Problem("missing", str(file), f"{file}: must be there, got nothing; {cure}")
        elif file.stat().st_size != entry.get("bytes") or sha256(file) != entry.get("sha256"):
            yield Problem("changed", str(file), f"{file}: must have the bytes that were recorded, got others; {cure}")


def folders(place: Path) -> list[Path]:
    """Return the published folders in a room, sorted; temporaries and files are not among them."""
    if not place.is_dir():
        return []
    return sorted(p for p in place.iterdir() if p.is_dir() and not is_temporary(p))


def folder_card(folder: Path) -> Card | CardError:
    """Return the card of a checkpoint folder, or the error that says what is wrong with it."""
    file = folder / "card.json"
    try:
        return parse_card(_read(file), where=str(file))[0]
    except CardError as error:
        return error


def readable(line: str, where: str) -> list[Card]:
    """Return the card on one line, or nothing when it is broken (``check`` reports it)."""
    try:
        return [parse_card(line, where=where)[0]]
    except CardError:
        return []


def manifest(folder: Path) -> dict[str, Any]:
    """Return a bundle's manifest, empty when it cannot be read."""
    return _json_object(folder / "manifest.json")


def made_at(folder: Path) -> int:
    """Return when a bundle was written, in ns: its manifest's time, as engines built later touch the folder."""
    file = folder / "manifest.json"
    return file.stat().st_mtime_ns if file.is_file() else 0


def card_files(place: Path, listing: str) -> list[Path]:
    """Return every file in ``place`` that holds cards, sorted."""
    files = [place / listing, *(folder / "card.json" for folder in folders(place))]
    return [file for file in files if file.is_file()]


def stamp(place: Path, listing: str) -> object:
    """Return a value that changes when a card in ``place`` is added, replaced or removed."""
    return tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in card_files(place, listing))


def sha256(file: Path) -> str:
    """Return the sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as handle:
            return handle.read(MAX_CARD_BYTES + 1)
    except OSError as error:
        raise CardError(f"{file}: must be a readable card, got '{error.strerror}'; add the checkpoint again") from error


def _json_object(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
