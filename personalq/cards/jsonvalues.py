"""Read the values of a JSON file one by one, each with its place: a list, 'items', objects a line. Knows JSON, not cards.

A value that does not parse is a CardError in its place; the others are read all the same where that can be done.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CardError, RepositoryError

MAX_CATALOGUE_BYTES = 512 << 20
_OPENED = re.compile(r'\s*(?:\[|\{\s*"items"\s*:\s*\[)')
_BETWEEN = re.compile(r"[\s,]*")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Value:
    """One JSON value and where it stands: 'file:line', 'file:item', or the file alone for all there is in it.

    line: its text when it is a line of its own, which then may not even parse. is_item: an entry of a list; otherwise it
    may be a list of entries itself.
    """

    where: str
    value: Any
    line: str = ""
    is_item: bool = False


def read_text(file: Path) -> str:
    """The text of a file in UTF-8 or UTF-16, its byte order mark taken off. Raises RepositoryError."""
    try:
        if file.stat().st_size > MAX_CATALOGUE_BYTES:
            raise RepositoryError(f"{file}: must be at most {MAX_CATALOGUE_BYTES >> 20} MB, got more; split it")
        data = file.read_bytes()
    except OSError as error:
        raise RepositoryError(f"{file}: must be a readable file, got '{error.strerror}'; check the path") from error
    return data.decode("utf-16" if data.startswith(_UTF_16) else "utf-8-sig", errors="replace")


def values_of(text: str, file: Path) -> Iterator[Value | CardError]:
    """Yield the values of a file: the items of one list, or the objects on its lines, or one after another."""
    whole = _parsed(text)
    if isinstance(whole, dict) and isinstance(whole.get("items"), list):
        whole = whole["items"]
    if isinstance(whole, list):
        yield from (Value(f"{file}:{number}", entry, is_item=True) for number, entry in enumerate(whole, 1))
    elif isinstance(whole, dict):
        yield Value(str(file), whole)  # an entry, or a dict of them
    elif (start := _start_of_items(text)) is not None:
        yield from _one_by_one(text, start, file)
    else:
        yield from _lines(text, file)


def _parsed(text: str) -> Any:
    """The JSON value of a text; a CardError, not raised, when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return CardError(str(error)[:80] or type(error).__name__)


def _start_of_items(text: str) -> int | None:
    """Where the items of a list begin that does not parse as a whole; None when the file has a value a line."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    if not isinstance(_parsed(first), CardError):
        return None
    if (opened := _OPENED.match(text)) is not None:
        return opened.end()
    try:  # objects over several lines, one after another
        json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except (ValueError, RecursionError):
        return None
    return 0


def _one_by_one(text: str, start: int, file: Path) -> Iterator[Value | CardError]:
    """Read items as far as they parse; after a broken one, from the next that begins a line as it does."""
    decoder, number, place = json.JSONDecoder(), 0, start
    while (place := _skip(text, place)) < len(text) and text[place] not in "]}":
        number += 1
        where = f"{file}:{number}"
        try:
            value, place = decoder.raw_decode(text, place)
            yield Value(where, value, is_item=True)
        except (ValueError, RecursionError) as error:
            following = _next_like(text, place)
            rest = "" if following is not None else "; what follows was not read"
            reason = f"must be JSON, got an item that does not parse ({str(error)[:80]}){rest}"
            yield CardError(f"{where}: {reason}; fix the file")
            if following is None:
                return
            place = following
    if (tail := text[place:].strip()) or start:
        ending = _parsed(text[:start] + tail)
        if isinstance(ending, CardError):
            got = f"text that does not parse ({tail[:20]!r})" if tail else "the end of the file: it was cut off"
            yield CardError(f"{file}: must end as JSON ends after item {number}, got {got}; fetch it again")


def _skip(text: str, place: int) -> int:
    between = _BETWEEN.match(text, place)
    return between.end() if between else place


def _next_like(text: str, place: int) -> int | None:
    """Where the next object begins that stands on its line as the one at `place` does; None when there is none."""
    indent = text[text.rfind("\n", 0, place) + 1 : place]
    following = text.find(f"\n{indent}{{", place) if not indent.strip() else -1
    return following if following >= 0 else None


def _lines(text: str, file: Path) -> Iterator[Value | CardError]:
    numbered = [(number, line.strip().lstrip("\ufeff")) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in numbered if line]
    if len(lines) > 1 and all(isinstance(_parsed(line), CardError) for _, line in lines):
        got = f"text that does not parse ({_parsed(text)})"
        yield CardError(f"{file}: must be JSON, or one JSON object a line, got {got}; fix the file")
        return
    for number, line in lines:
        value = _parsed(line)
        yield Value(f"{file}:{number}", None if isinstance(value, CardError) else value, line)
