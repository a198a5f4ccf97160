"""Safetensors bytes that are reproducible: the library itself writes metadata keys in random order."""

import json
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

_ALIGNED = 8  # bytes; tensors begin at a multiple of it


def same_bytes(tensors: Mapping[str, npt.NDArray[np.generic]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with sorted metadata: equal content is an equal file, on every machine."""
    blob = save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, metadata=dict(metadata))
    begin = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:begin])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text + blob[begin:]
