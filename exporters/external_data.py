"""Write a graph and its weights: each tensor is converted from the checkpoint's separately and written at its offset in one file.

Several are converted at once, one per core; each needs only a few chunks of memory, whatever the checkpoint's size.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from personalq.numerics import pack_int4

ALIGNMENT = 64  # bytes; ONNX Runtime maps the file and reads tensors in place
PIECE = 1 << 18  # values converted at a time: temporaries fit the cache, and are small compared with the tensor
Array = npt.NDArray[Any]
Report = Callable[[str, float], None]


def silent(_: str, __: float) -> None:
    """No progress shown."""


def unchanged(rows: Array, _: int) -> Array:
    """The checkpoint's rows as they are; writing them casts."""
    return rows


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the data file: made from the checkpoint tensor `source` by `convert`, piece by piece of its rows.

    convert: (checkpoint's rows [start, stop), start) -> those rows as stored (is_transposed: the result is transposed).
    given: the whole tensor, when it does not come from the checkpoint.
    """

    name: str
    source: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    convert: Callable[[Array, int], Array] = unchanged
    is_transposed: bool = False
    given: Array | None = None

    @property
    def n_bytes(self) -> int:
        return -(-int(np.prod(self.shape)) * self.dtype.bitwidth // 8)

    def make(self, read: Callable[[str], Array]) -> Array:
        """The whole tensor, as it is stored (INT4 still one value a byte). read: checkpoint tensor name -> array."""
        array = read(self.source) if self.given is None else self.given
        kind = np.int8 if self.dtype == ir.DataType.INT4 else self.dtype.numpy()
        made = np.empty(self.shape, kind)
        rows = made.T if self.is_transposed else made
        assert rows.shape == array.shape, f"{self.name}: {array.shape} written as {rows.shape}"
        if rows.ndim == 0:
            return np.asarray(self.convert(array[None], 0), kind).reshape(())
        step = max(1, PIECE // max(1, int(np.prod(rows.shape[1:]))))
        for start in range(0, len(rows), step):
            rows[start : start + step] = self.convert(array[start : start + step], start)
        return made


def as_float(name: str, shape: tuple[int, ...], dtype: ir.DataType) -> StoredTensor:
    """A tensor stored unquantised as float16 or float32, under its own name."""
    return StoredTensor(name, name, dtype, shape)


def write_graph(
    model: ir.Model,
    tensors: Sequence[StoredTensor],
    read: Callable[[str], Array],
    path: Path,
    data_name: str,
    report: Report = silent,
) -> None:
    """Write `path` (graph) and `data_name` beside it.

    read: checkpoint tensor name -> array, from any thread. Graph initializers named like a stored tensor become
    references into the file. Offsets depend only on the order of `tensors`, so the bytes do too.
    """
    places, size = [], 0
    for tensor in tensors:
        size += -size % ALIGNMENT
        places.append(size)
        _point(model.graph.initializers[tensor.name], tensor, size, path.parent, data_name)
        size += tensor.n_bytes
    with (path.parent / data_name).open("wb") as data:
        data.truncate(size)
        _write_all(list(zip(tensors, places, strict=True)), read, data.fileno(), report)
    forget_shapes(model)
    ir.save(model, path)


def _write_all(
    jobs: Sequence[tuple[StoredTensor, int]], read: Callable[[str], Array], file: int, report: Report
) -> None:
    """Convert and write every tensor; numpy releases the GIL during the expensive work."""

    def run(job: tuple[StoredTensor, int]) -> int:
        tensor, place = job
        array = tensor.make(read)
        blob = memoryview(pack_int4(array) if tensor.dtype == ir.DataType.INT4 else array).cast("B")
        done = 0
        while done < len(blob):
            done += os.pwrite(file, blob[done:], place + done)
        return tensor.n_bytes

    total, done, started = max(1, sum(tensor.n_bytes for tensor, _ in jobs)), 0, time.monotonic()
    with ThreadPoolExecutor(n_workers()) as pool:
        try:
            for n_bytes in pool.map(run, jobs):
                done += n_bytes
                left = (time.monotonic() - started) * (total - done) / max(done, 1)
                report(f"{done / 1e6:.0f} of {total / 1e6:.0f} MB, {left:.0f} s left", done / total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def n_workers() -> int:
    """Threads that make tensors: the cores this process may use, at most 8 (the disk is the limit then)."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _point(value: ir.Value, tensor: StoredTensor, offset: int, folder: Path, data_name: str) -> None:
    shape = ir.Shape(tensor.shape)
    value.const_value = ir.ExternalTensor(
        data_name, offset, tensor.n_bytes, tensor.dtype, shape=shape, name=tensor.name, base_dir=folder
    )
    value.type, value.shape = ir.TensorType(tensor.dtype), shape


def forget_shapes(model: ir.Model) -> None:
    """Drop the types and shapes noted on intermediate values: every loader infers them, and lowering made some stale."""
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.type, value.shape = None, None
