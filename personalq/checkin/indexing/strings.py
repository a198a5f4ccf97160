"""A table of texts in arrays, looked up without reading all of it: a dict that is paged from disk instead of held in memory."""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Strings:
    """Texts numbered 0..n-1, and their numbers by text.

    ``data`` uint8 holds the texts' UTF-8 end to end, text i at ``data[start[i]:start[i + 1]]``; ``hashes`` uint32 (n,) are
    their CRC-32 in order, ``order`` int32 (n,) whose each is.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], name: str = "") -> None:
        self._arrays = {part: arrays[f"{name}{part}"] for part in ("data", "start", "hashes", "order")}
        views: list[Any] = [array.data for array in self._arrays.values()]
        self._data, self._start, self._hashes, self._order = views

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """Return the table of distinct texts, numbered as given."""
        coded = [text.encode("utf-8", "replace") for text in texts]
        hashes = np.array([zlib.crc32(one) for one in coded], np.uint32)
        order = np.argsort(hashes, kind="stable").astype(np.int32)
        sizes = np.fromiter(map(len, coded), np.int64, len(coded))
        start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        data = np.frombuffer(b"".join(coded), np.uint8)
        return cls({"data": data, "start": start, "hashes": hashes[order], "order": order})

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """Return the four arrays under names that begin with ``name``."""
        return {f"{name}{part}": array for part, array in self._arrays.items()}

    def get(self, text: str) -> int | None:
        """Return the number of a text, or None."""
        coded = text.encode("utf-8", "replace")
        wanted = zlib.crc32(coded)
        row, n = bisect_left(self._hashes, wanted), len(self._order)
        while row < n and self._hashes[row] == wanted:
            place = self._order[row]
            if self._data[self._start[place] : self._start[place + 1]] == coded:
                return int(place)
            row += 1
        return None

    def __getitem__(self, text: str) -> int:
        place = self.get(text)
        if place is None:
            raise KeyError(text)
        return place

    def __contains__(self, text: str) -> bool:
        return self.get(text) is not None

    def text(self, place: int) -> str:
        """Return text number ``place``."""
        return str(self._data[self._start[place] : self._start[place + 1]], "utf-8")

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[str]:
        return map(self.text, range(len(self)))
