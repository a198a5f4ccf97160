"""The card: what is known about one checkpoint. Knows text and its limits, not weights and not folders.

Card text was written by strangers: it is cleaned of control and invisible characters, cut to size, and never trusted.
"""

from __future__ import annotations

import functools
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Annotated, Any
from urllib.parse import quote, unquote

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..errors import CardError
from .kinds import Kind, kind_note, kind_problem, known_kind
from .triggers import meant

MAX_CARD_BYTES = 4 << 20
MAX_ID, MAX_NAME, MAX_NOUN, MAX_TEXT, MAX_LINE, MAX_ITEMS = 200, 200, 80, 4000, 400, 64
_RESERVED_IDS = frozenset({"cards.jsonl"})
_SPACES = re.compile(r"\s+")
_LISTS = frozenset({"trigger", "tags", "example_prompts"})
_READ = ("name", "base", "trigger", "class_noun", "description", "tags", "example_prompts", "source")


def clean_text(text: str, limit: int) -> str:
    """Return one line of visible text, at most ``limit`` characters."""
    head = unicodedata.normalize("NFC", text[: 8 * limit])
    if head.isprintable():
        return _SPACES.sub(" ", head).strip()[:limit].rstrip()
    # Cf are invisible format characters, Co/Cn private or unassigned: all of them can hide text from the reader.
    visible = "".join(" " if c.isspace() else c for c in head if c.isspace() or unicodedata.category(c)[0] != "C")
    return _SPACES.sub(" ", visible).strip()[:limit].rstrip()


def valid_id(text: str) -> str:
    """Return ``text`` if it can name a checkpoint: ``name`` or ``owner/name``; raise CardError otherwise."""
    if problem := _id_problem(text):
        raise CardError(
            f"id {text[:60]!r}: must be a plain name such as 'my-dog' or 'owner/my-dog', got {problem}; rename it"
        )
    return text


def _id_problem(text: str) -> str:
    parts = text.split("/")
    rules = (
        (not text, "an empty name"),
        (len(text) > MAX_ID or len(quote(text, safe="")) > MAX_ID, f"more than {MAX_ID} characters"),
        (text.startswith("/") or re.match(r"[A-Za-z]:", text) is not None, "an absolute path"),
        (any(part in ("", ".", "..") for part in parts), "a path that leaves its folder"),
        ("\\" in text or "\x00" in text, "a path separator"),
        (text != clean_text(text, 2 * MAX_ID), "invisible characters or loose spaces"),
        (text in _RESERVED_IDS, "a reserved name"),
    )
    return next((name for is_bad, name in rules if is_bad), "")


def folder_name(card_id: str) -> str:
    """Map an id to one safe folder name; ``id_from_folder`` is its inverse. ``a/b`` becomes ``a%2Fb``."""
    name = quote(valid_id(card_id), safe="")
    return "%2E" + name[1:] if name.startswith(".") else name


def id_from_folder(name: str) -> str:
    """Map a folder name back to the id it was made from."""
    return unquote(name)


def _checked_id(text: str) -> str:
    try:
        return valid_id(text)
    except CardError as error:
        raise ValueError(str(error)) from error


class Origin(BaseModel):
    """Where a field came from and how sure the importer is of it, 0 to 1."""

    model_config = ConfigDict(frozen=True)
    source: str = Field(max_length=MAX_LINE)
    confidence: float = Field(default=1.0, ge=0.0, le=1.0)


Line = Annotated[str, Field(max_length=MAX_LINE)]


class Card(BaseModel):
    """One checkpoint's card. Empty text means unknown; ``trigger`` is a list of groups, several words each at most."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: Annotated[str, AfterValidator(_checked_id)]
    name: str = Field(default="", max_length=MAX_NAME)
    kind: Kind
    base: str = Field(default="", max_length=MAX_LINE)
    trigger: tuple[Line, ...] = Field(default=(), max_length=MAX_ITEMS)
    class_noun: str = Field(default="", max_length=MAX_NOUN)
    description: str = Field(default="", max_length=MAX_TEXT)
    tags: tuple[Line, ...] = Field(default=(), max_length=MAX_ITEMS)
    example_prompts: tuple[Line, ...] = Field(default=(), max_length=MAX_ITEMS)
    source: str = Field(default="", max_length=MAX_LINE)
    provenance: dict[str, Origin] = Field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, keys in field order."""
        return self.model_dump(mode="json")


def is_style(card: Card) -> bool:
    """Tell whether a card is a way of drawing rather than a thing."""
    return _has_style(card.class_noun)


@functools.lru_cache(maxsize=4096)
def _has_style(class_noun: str) -> bool:
    return re.search(r"(?<![^\W_])style(?![^\W_])", class_noun, re.IGNORECASE) is not None


def read_card(data: object, *, where: str) -> tuple[Card, tuple[str, ...]]:
    """Read a card.json object or a catalogue line; return the card and warnings.

    Accepts ``base`` or ``base_model``, ``source`` with ``source_ref``, and every word of ``kinds``; numbers count as text,
    unknown keys are ignored. Raises CardError.
    """
    if not isinstance(data, Mapping):
        raise CardError(
            f"{where}: must be a JSON object with an id and a kind, got {type(data).__name__}; fix the file"
        )
    said = _text(data.get("kind"), MAX_NOUN)
    kind = known_kind(said)
    if not kind:
        raise CardError(f"{where}: {kind_problem(said)}")
    trigger, notes = meant(_texts(data.get("trigger")))
    fields: dict[str, Any] = {
        "id": _id(data.get("id"), where),
        "name": _text(data.get("name"), MAX_NAME),
        "kind": kind,
        "base": _text(data.get("base") or data.get("base_model"), MAX_LINE),
        "trigger": trigger,
        "class_noun": _text(data.get("class_noun"), MAX_NOUN),
        "description": _text(data.get("description"), MAX_TEXT),
        "tags": _texts(data.get("tags")),
        "example_prompts": _texts(data.get("example_prompts")),
        "source": ": ".join(filter(None, (_text(data.get(k), MAX_LINE // 2 - 1) for k in ("source", "source_ref")))),
        "provenance": _provenance(data),
    }
    fields["name"] = fields["name"] or fields["id"][:MAX_NAME]
    try:
        card = Card.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        raise CardError(f"{where}: {text}" if place == "id" else f"{where}: {place}: {text}") from error
    read_as = kind_note(said, kind)
    return card, (*([read_as] if read_as else []), *notes, *_warnings(card, data))


def parse_card(text: str | bytes, *, where: str) -> tuple[Card, tuple[str, ...]]:
    """Parse JSON text of one card; raise CardError when it is not JSON or not a card."""
    if len(text) > MAX_CARD_BYTES:
        raise CardError(
            f"{where}: must be at most {MAX_CARD_BYTES >> 20} MB of JSON, got {len(text) / 2**20:.1f} MB; shorten it"
        )
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CardError(
            f"{where}: must be JSON, got text that does not parse ({_short(error)}); fix the file"
        ) from error
    return read_card(data, where=where)


def dump_card(card: Card) -> bytes:
    """Return the card.json bytes of a card."""
    return (json.dumps(card.to_json(), indent=2, ensure_ascii=False) + "\n").encode()


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:80]


def _id(value: object, where: str) -> str:
    if value is not None and _written(value) is None:
        raise CardError(f"{where}: id must be text, got {type(value).__name__}; fix the card")
    return (_written(value) or "").strip()


def _written(value: object) -> str | None:
    """Text as it stands, a number as it is written; None for anything else."""
    if isinstance(value, bool):
        return None
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if isinstance(value, str) else str(value) if is_number else None


def _text(value: object, limit: int) -> str:
    items = value if isinstance(value, list | tuple) else [value]
    return clean_text(next((text for item in items if (text := _written(item))), ""), limit)


def _texts(value: object) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    texts = (clean_text(text, MAX_LINE) for item in items[:MAX_ITEMS] if (text := _written(item)))
    return tuple(dict.fromkeys(text for text in texts if text))


def _provenance(data: Mapping[str, Any]) -> dict[str, Origin]:
    given = data.get("provenance")
    found: dict[str, Origin] = {}
    for field, value in list(given.items())[:MAX_ITEMS] if isinstance(given, Mapping) else ():
        if isinstance(value, Mapping):
            sure = value.get("confidence", 1.0)
            number = float(sure) if isinstance(sure, int | float) and 0 <= sure <= 1 else 0.0
            found[clean_text(str(field), MAX_NOUN)] = Origin(
                source=_text(value.get("source"), MAX_LINE), confidence=number
            )
    if via := _text(data.get("via"), MAX_LINE):
        found.setdefault("card", Origin(source=via))
    return found


def _warnings(card: Card, data: Mapping[str, Any]) -> tuple[str, ...]:
    found = []
    if not card.trigger:
        found.append("no trigger on the card: prompts are used as they are written")
    description = data.get("description")
    if isinstance(description, str) and len(description) > MAX_TEXT:
        found.append(f"description cut to {MAX_TEXT} of {len(description)} characters")
    for field in _READ:
        found += [f"{field} {problem}" for problem in _not_used(data.get(field), is_list=field in _LISTS)]
    return tuple(found)


def _not_used(value: object, *, is_list: bool) -> Iterator[str]:
    """What of a field was not used: values that are no text, and what a list holds beyond the limit."""
    items = value if isinstance(value, list | tuple) else [] if value is None else [value]
    odd = [type(item).__name__ for item in items if item is not None and _written(item) is None]
    if odd:
        yield f"must be text, got {', '.join(dict.fromkeys(odd[:3]))}: left out"
    if is_list and len(items) > MAX_ITEMS:
        yield f"cut to {MAX_ITEMS} of {len(items)} entries"
