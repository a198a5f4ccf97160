"""Writing a graph and its weights: tensors are produced one by one and streamed into one external data file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from personalq.numerics import pack_int4

ALIGNMENT = 64  # bytes; ONNX Runtime maps the file and reads tensors in place
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the data file: made from the checkpoint tensor `source` by `convert` when it is written."""

    name: str
    source: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    convert: Callable[[Array], Array]

    @property
    def n_bytes(self) -> int:
        return -(-int(np.prod(self.shape)) * self.dtype.bitwidth // 8)


def as_float(name: str, shape: tuple[int, ...], dtype: ir.DataType) -> StoredTensor:
    """A tensor stored unquantised as float16 or float32, under its own name."""
    kind = np.float16 if dtype == ir.DataType.FLOAT16 else np.float32
    return StoredTensor(name, name, dtype, shape, lambda x: x.astype(kind))


def write_graph(
    model: ir.Model, tensors: list[StoredTensor], read: Callable[[str], Array], path: Path, data_name: str
) -> None:
    """Write `path` (graph) and `data_name` beside it. Each tensor is read, converted and written in turn: O(1) memory.

    read: checkpoint tensor name -> array. Graph initializers named like a stored tensor become references into the file.
    """
    offset = 0
    with (path.parent / data_name).open("wb") as data:
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.convert(read(tensor.source)))
            assert array.shape == tensor.shape, f"{tensor.name}: {array.shape} written as {tensor.shape}"
            data.write(b"\0" * (-offset % ALIGNMENT))
            offset += -offset % ALIGNMENT
            blob = pack_int4(array) if tensor.dtype == ir.DataType.INT4 else array
            data.write(memoryview(blob).cast("B"))
            _point(model.graph.initializers[tensor.name], tensor, offset, path.parent, data_name)
            offset += tensor.n_bytes
    forget_shapes(model)
    ir.save(model, path)


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
