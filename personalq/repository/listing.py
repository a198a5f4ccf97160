"""The list of cards without weights, one JSON object a line: read line by line, broken lines left to ``check``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..cards.card import MAX_CARD_BYTES, Card
from ..errors import RepositoryError
from . import audit


def listed_cards(file: Path) -> Iterator[tuple[int, Card]]:
    """Yield the cards of a list, each with the byte where its line begins; no file, no cards. Raises RepositoryError."""
    if not file.is_file():
        return
    try:
        with file.open("rb") as handle:
            offset = 0
            while line := handle.readline(MAX_CARD_BYTES + 2):
                for card in _read(line, f"{file}: byte {offset}"):
                    yield offset, card
                offset += len(line)
    except OSError as error:
        raise RepositoryError(
            f"{file}: must be a readable JSONL file, got '{error.strerror}'; check the path"
        ) from error


def card_at(handle: BinaryIO, offset: int) -> list[Card]:
    """Return the card on the line that begins at byte ``offset``, or nothing when it is broken."""
    handle.seek(offset)
    return _read(handle.readline(MAX_CARD_BYTES + 2), f"byte {offset}")


def _read(line: bytes, where: str) -> list[Card]:
    try:
        return [Card.model_validate_json(line)] if line.strip() else []
    except ValueError:
        return audit.readable(line.decode("utf-8", "replace"), where)
