"""Read tensors of a safetensors file by memory map. Knows bytes, dtypes and shapes, not models.

`header` checks every field against the file's length first, so a truncated or hostile file is one clear line and never
a wrong tensor.
"""

from __future__ import annotations

import mmap
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RepositoryError
from .header import read_header

Array = npt.NDArray[Any]

# BF16 has no numpy type: its 16 bits are the upper half of a float32. The 8-bit floats have none either: a table of 256.
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
    "F8_E4M3": np.dtype("<u1"),
    "F8_E5M2": np.dtype("<u1"),
}

RESIDENT = 128 << 20  # bytes of a file that may stay mapped in; the rest is the page cache's, not this process's


class TensorFile:
    """A memory-mapped safetensors file. Arrays it returns are read-only views of the map (BF16: a float32 copy).

    Pages read long ago are given back, so that a process stays small beside the files it reads; a view of them that is
    still used reads them again. Raises RepositoryError for a broken file and for a dtype that numpy cannot hold.
    """

    def __init__(self, path: Path):
        header = read_header(path)
        for name, entry in header.entries.items():
            if entry.dtype not in _DTYPES:
                known = ", ".join(_DTYPES)
                raise RepositoryError(
                    f"{path}: {name}: dtype must be one of {known}, got {entry.dtype}; convert it to F16 or F32"
                )
        self.path = path
        self.metadata = header.metadata
        self.entries = header.entries
        self.shapes = header.shapes
        self._touched = 0
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.entries))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def read(self, name: str) -> Array:
        """The tensor in its own dtype; BF16 and 8-bit floats are widened to float32, exactly."""
        array, dtype = self.bits(name), self.entries[name].dtype
        if dtype == "BF16":
            return widened(array)
        return _FLOAT8[dtype]()[array] if dtype in _FLOAT8 else array

    def bits(self, name: str) -> Array:
        """The tensor's bits as the file has them: BF16 as uint16, 8-bit floats as uint8."""
        entry = self.entries[name]
        self._touched += entry.end - entry.begin
        if self._touched > RESIDENT and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = entry.end - entry.begin
        dtype = _DTYPES[entry.dtype]
        count = (entry.end - entry.begin) // dtype.itemsize
        return np.frombuffer(self._map, dtype, count, entry.begin).reshape(entry.shape)


def widened(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """BF16 bits (any shape, uint16) -> the same numbers as float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@cache
def e4m3() -> npt.NDArray[np.float32]:
    """(256,) values of float8 E4M3FN: 4 exponent bits, bias 7, no infinities, NaN where all seven bits are set."""
    table = _float8(mantissa_bits=3, bias=7)
    table[[0x7F, 0xFF]] = np.nan
    return table


@cache
def e5m2() -> npt.NDArray[np.float32]:
    """(256,) values of float8 E5M2: 5 exponent bits, bias 15; infinities and NaN as in IEEE 754."""
    table = _float8(mantissa_bits=2, bias=15)
    table[[0x7C, 0xFC]] = np.inf, -np.inf
    table[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    return table


def _float8(mantissa_bits: int, bias: int) -> npt.NDArray[np.float32]:
    """Micikevicius et al. 2022 (arXiv 2209.05433), table 1: sign, exponent, mantissa; exponent 0 is subnormal."""
    bits = np.arange(256)
    exponent, mantissa = (bits & 0x7F) >> mantissa_bits, bits & ((1 << mantissa_bits) - 1)
    significand = mantissa / (1 << mantissa_bits) + (exponent > 0)
    values = np.ldexp(significand, np.maximum(exponent, 1) - bias)
    table: npt.NDArray[np.float32] = np.where(bits < 128, values, -values).astype(np.float32)
    return table


_FLOAT8 = {"F8_E4M3": e4m3, "F8_E5M2": e5m2}
