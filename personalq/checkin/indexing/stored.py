"""The cards beside the index, read one by one, so that a large catalogue need not fit in memory."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from ...cards.card import Card

_FILE, _ENDS = "cards.jsonl", "cards.npy"
_KEPT = 2048  # cards that stay in memory after they were read


class StoredCards(Sequence[Card]):
    """The cards that ``store_cards`` wrote, in their order. Where they came from (``provenance``) is not kept.

    Raises OSError or ValueError when the files are not whole.
    """

    def __init__(self, folder: Path) -> None:
        self._ends = np.load(folder / _ENDS, mmap_mode="r")
        n_bytes = (folder / _FILE).stat().st_size
        if n_bytes != (int(self._ends[-1]) if len(self._ends) else 0):
            raise ValueError(f"{folder / _FILE}: must be as long as {_ENDS} says, got {n_bytes} bytes; build it again")
        self._data = np.asarray(np.memmap(folder / _FILE, np.uint8, "r") if n_bytes else np.zeros(0, np.uint8))
        self._kept = functools.lru_cache(_KEPT)(self._read)

    def _read(self, place: int) -> Card:
        begin = int(self._ends[place - 1]) if place else 0
        return Card.model_validate_json(self._data[begin : int(self._ends[place])].tobytes())

    @overload
    def __getitem__(self, place: int) -> Card: ...
    @overload
    def __getitem__(self, place: slice) -> list[Card]: ...
    def __getitem__(self, place: int | slice) -> Card | list[Card]:
        if isinstance(place, slice):
            return [self._kept(i) for i in range(*place.indices(len(self)))]
        return self._kept(range(len(self))[place])

    def __iter__(self) -> Iterator[Card]:
        return map(self._read, range(len(self)))

    def __len__(self) -> int:
        return len(self._ends)


def store_cards(cards: Iterable[Card], folder: Path) -> StoredCards:
    """Write cards into ``folder`` one by one, and return them as stored."""
    ends, total = array("q"), 0
    with (folder / _FILE).open("wb") as file:
        for card in cards:
            total += file.write(card.model_dump_json(exclude_defaults=True, exclude={"provenance"}).encode() + b"\n")
            ends.append(total)
    np.save(folder / _ENDS, np.array(ends, np.int64))
    return StoredCards(folder)
