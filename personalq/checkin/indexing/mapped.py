"""Write arrays as a safetensors file, and memory-map one: pages are read on use, and shared between processes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DTYPES = {
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "U32": np.uint32,
}


def map_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """Return read-only arrays by name. Raises ValueError, KeyError or OSError on a file that is not whole."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        header = json.loads(file.read(min(length, path.stat().st_size)))
    data = (
        np.asarray(np.memmap(path, np.uint8, "r", offset=8 + length))
        if path.stat().st_size > 8 + length
        else np.zeros(0, np.uint8)
    )
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            arrays[name] = data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def write_safetensors(arrays: Mapping[str, NDArray[Any]], path: Path) -> None:
    """Write arrays one after the other; the library's own writer first copies all of them into memory."""
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])):  # so that all lie aligned
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text) + -len(text) % 8) + text + b" " * (-len(text) % 8))
        for name in header:
            np.ascontiguousarray(arrays[name]).tofile(file)
