"""Read and validate the header of a safetensors file without its weights. Knows bytes and lengths, not models."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import RepositoryError
from .pickles import misnamed

MAX_HEADER_BYTES = 100_000_000
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: dtype as the file names it, and its bytes as [begin, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, and its free-text metadata."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor shapes by name."""
        return {name: entry.shape for name, entry in self.entries.items()}


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file after checking it against the file's length.

    Raises RepositoryError when the file is missing, truncated, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise misnamed(path) or _refusal(path, f"a file of {size} bytes whose header claims {length}")
            text = file.read(length)
    except OSError as error:
        raise RepositoryError(f"{path}: must be a readable file, got '{error.strerror}'; check the path") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, "a header that is not JSON") from error
    if not isinstance(data, dict):
        raise _refusal(path, "a header that is not a JSON object")
    metadata = data.pop("__metadata__", {})
    entries = _entries(path, data, 8 + length, size)
    strings = metadata.items() if isinstance(metadata, dict) else ()
    return Header(entries, {str(k): v for k, v in strings if isinstance(v, str)})


def _entries(path: Path, data: dict[str, Any], start: int, size: int) -> dict[str, Entry]:
    entries, place = {}, start
    for name, entry in data.items():
        try:
            shape = tuple(_natural(n) for n in entry["shape"])
            begin, end = (_natural(n) for n in entry["data_offsets"])
            want = math.prod(shape) * _BITS[entry["dtype"]] // 8
        except (KeyError, TypeError, ValueError) as error:
            raise _refusal(path, f"a broken entry for tensor {name[:60]!r}") from error
        if end - begin != want:
            raise _refusal(path, f"{end - begin} bytes for tensor {name[:60]!r} of {want}")
        entries[name] = Entry(entry["dtype"], shape, start + begin, start + end)
    for begin, end in sorted((entry.begin, entry.end) for entry in entries.values()):
        if begin != place:
            raise _refusal(path, f"a hole or an overlap at byte {place - start}")
        place = end
    if place != size:
        raise _refusal(path, f"{size - start} bytes of weights where the header lists {place - start}")
    return entries


def _natural(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(value)
    return value


def _refusal(path: Path, got: str) -> RepositoryError:
    return RepositoryError(
        f"{path}: must be a whole safetensors file, got {got}; it is truncated or damaged, fetch it again"
    )
