"""Read tensors of a safetensors file by memory map. Knows bytes, dtypes and shapes, not models.

`personalq.header` checks every field against the file's length first, so a truncated or hostile file is one clear line
and never a wrong tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import RepositoryError
from personalq.header import read_header

Array = npt.NDArray[Any]

# BF16 has no numpy type: its 16 bits are the upper half of a float32.
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("<i1"),
    "U8": np.dtype("<u1"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype as the file names it, and its bytes as [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A memory-mapped safetensors file. Arrays it returns are read-only views of the map (BF16: a float32 copy)."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata = read_header(path).metadata
        self.entries = _read_entries(path)
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.entries))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def read(self, name: str) -> Array:
        """The tensor in its own dtype; BF16 is widened to float32."""
        entry = self.entries[name]
        array: Array = np.frombuffer(self._bytes[entry.begin : entry.end], _DTYPES[entry.dtype]).reshape(entry.shape)
        return widened(array) if entry.dtype == "BF16" else array


def widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """BF16 bits (any shape, uint16) -> the same numbers as float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _read_entries(path: Path) -> dict[str, Entry]:
    """Where each tensor lies; `read_header` has checked the file already."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in value["data_offsets"])
        entries[name] = Entry(value["dtype"], tuple(value["shape"]), begin, end)
        if value["dtype"] not in _DTYPES:
            known, got = ", ".join(_DTYPES), value["dtype"]
            raise RepositoryError(f"{path}: {name}: dtype must be one of {known}, got {got}; convert it to F16 or F32")
    return entries
