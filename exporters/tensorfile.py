"""Read tensors of a safetensors file by memory map. Knows bytes, dtypes and shapes, not models.

Every header field is checked against the file's length before a byte is used, so a truncated or hostile file is one
clear line and never a wrong tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import RepositoryError

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
_MAX_HEADER_BYTES = 100 << 20


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
        self.metadata, self.entries = _read_header(path)
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


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _broken(path, f"a header of {length} bytes in a file of {size}")
            raw = file.read(length)
    except OSError as error:
        raise RepositoryError(
            f"{path}: must be a readable safetensors file, got '{error.strerror}'; add it again"
        ) from error
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: _entry(value, 8 + length) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _broken(path, f"a header that does not parse ({str(error)[:60]})") from error
    for name, entry in entries.items():
        _check(path, size, name, entry)
    return {str(key): str(value) for key, value in metadata.items()}, entries


def _entry(value: dict[str, Any], start: int) -> Entry:
    begin, end = (int(offset) for offset in value["data_offsets"])
    return Entry(str(value["dtype"]), tuple(int(side) for side in value["shape"]), start + begin, start + end)


def _check(path: Path, size: int, name: str, entry: Entry) -> None:
    if entry.dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise RepositoryError(
            f"{path}: {name}: dtype must be one of {known}, got {entry.dtype}; convert it to F16 or F32"
        )
    count = 1
    for side in entry.shape:
        count *= side
    if entry.end > size:
        raise _broken(path, f"{size} of at least {entry.end} bytes")
    if (
        min((*entry.shape, entry.begin - 8), default=0) < 0
        or entry.end - entry.begin != count * _DTYPES[entry.dtype].itemsize
    ):
        raise _broken(path, f"{name} with {entry.end - entry.begin} bytes for {entry.dtype} {list(entry.shape)}")


def _broken(path: Path, got: str) -> RepositoryError:
    return RepositoryError(
        f"{path}: must be a whole safetensors file, got {got}: it was cut off or changed; copy it again"
    )
