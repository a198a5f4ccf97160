"""Read lists of cards without weights: JSON, or one JSON object a line; our own cards, the formats of ``foreign``, DreamBooth's.

Each row stands alone: it becomes the JSON text of one card, or the reason why it is left out. Knows files, not repositories.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CardError
from .card import Card, parse_card
from .collisions import repeated_id
from .foreign import FORMATS, reader_of
from .jsonvalues import Value, read_text, values_of
from .sidecars import unwanted

_SUBJECT = re.compile(r"^([\w-]+),([\w -]+)$")


@dataclass(frozen=True)
class Row:
    """One entry of a catalogue: where it stands, and its JSON text (our own card format)."""

    where: str
    text: str


@dataclass(frozen=True)
class Listed:
    """One card of a catalogue, where it stands, and what to say about it."""

    where: str
    card: Card
    warnings: tuple[str, ...]


def read_cards(file: Path, *, adult: bool = False) -> Iterator[Listed | CardError]:
    """Yield every card of a catalogue in order, what is left out as CardError; of one id the last holds.

    Raises RepositoryError for a file that cannot be read. ``adult`` as in ``read_rows``.
    """
    seen: dict[str, str] = {}
    for row in read_rows(file, adult=adult):
        if isinstance(row, CardError):
            yield row
            continue
        try:
            card, warnings = parse_card(row.text, where=row.where)
        except CardError as error:
            yield error
        else:
            yield Listed(row.where, card, warnings + repeated_id(card.id, row.where, seen))


def read_rows(file: Path, *, adult: bool = False) -> Iterator[Row | CardError]:
    """Yield every entry of a catalogue file; entries left out are yielded as CardError. Raises RepositoryError.

    ``adult`` takes in what is marked as adult content or as a real person.
    """
    text = read_text(file)
    if _is_dreambooth(text):
        yield from _dreambooth(text, file)
        return
    for one in values_of(text, file):
        if isinstance(one, CardError):
            yield one
        elif one.line and (not isinstance(one.value, Mapping | list) or _is_own(one.value)):
            yield Row(one.where, one.line)  # as it stands: parse_card says what is wrong with it
        else:
            yield from _rows(one, adult=adult)


def _is_own(value: object) -> bool:
    """Tell whether a value is one of our cards, or nothing that is known (then reading it as a card says so)."""
    return isinstance(value, Mapping) and reader_of(value) is None and not isinstance(value.get("items"), list)


def _rows(one: Value, *, adult: bool) -> Iterator[Row | CardError]:
    """The rows of one value: an entry, or many of them (a list, an object with 'items', a dict of entries by id)."""
    entries = [one.value] if one.is_item else _entries(one.value)
    if not entries:
        yield CardError(f"{one.where}: must hold a JSON object, got an empty list; fix the file")
    is_itself = one.is_item or (one.line != "" and entries[:1] == [one.value])
    for number, entry in enumerate(entries, 1):
        where = one.where if is_itself else f"{one.where}, item {number}" if one.line else f"{one.where}:{number}"
        if isinstance(entry, Mapping):
            yield from _entry(entry, where, adult=adult)
        else:
            yield CardError(f"{where}: must be a JSON object, got {type(entry).__name__}; fix the file")


def _entries(value: Any) -> list[Any]:
    """Return the entries of a list, of an object's 'items', or of a dict of entries by id (StylusDocs)."""
    if isinstance(value, list) or not isinstance(value, Mapping):
        return value if isinstance(value, list) else [value]
    if isinstance(value.get("items"), list):
        return list(value["items"])
    n_objects = sum(isinstance(entry, Mapping) for entry in value.values())
    if 2 * n_objects <= len(value) or any(key in value for key in (*FORMATS, "id", "kind")):
        return [value]
    rows = value.items()
    return [{"adapter_id": key, **entry} if isinstance(entry, Mapping) else entry for key, entry in rows]


def _entry(entry: Mapping[str, Any], where: str, *, adult: bool) -> Iterator[Row | CardError]:
    reader = reader_of(entry)
    why = unwanted(entry) if reader is not None and not adult else ""
    if why:
        yield CardError(f"{where}: left out, it is {why}; take it in with --adult")
        return
    try:
        if reader is None:
            yield Row(where, json.dumps(entry))
            return
        for found in reader(entry):
            if isinstance(found, str):
                yield CardError(f"{where}: {found}; fix the file")
                continue
            fields = {name: value for name, (value, _, _) in found.items() if value}
            fields["provenance"] = {n: {"source": s, "confidence": c} for n, (v, s, c) in found.items() if v}
            yield Row(where, json.dumps(fields))
    except (RecursionError, ValueError) as error:
        reason = f"must be an entry that can be read, got one that cannot ({str(error)[:80]})"
        yield CardError(f"{where}: {reason}; fix the file")


# --- google/dreambooth


def _is_dreambooth(text: str) -> bool:
    return text.lstrip()[:200].lower().startswith(("classes", "subject_name,class", "live subjects", "object"))


def _dreambooth(text: str, file: Path) -> Iterator[Row | CardError]:
    """Read google/dreambooth's prompts_and_classes.txt: 'subject_name,class' lines; the prompts after them are scenes."""
    for number, line in enumerate(text.splitlines(), 1):
        match = _SUBJECT.match(line.strip())
        if match is None or match[1] == "subject_name":
            continue
        where = {"source": "google/dreambooth prompts_and_classes.txt", "confidence": 0.9}
        fields = {
            "id": match[1],
            "name": match[1],
            "kind": "dreambooth",
            "class_noun": match[2].strip(),
            "provenance": {"card": where},
        }
        yield Row(f"{file}:{number}", json.dumps(fields))
