"""Read and edit ONNX files without onnx: protobuf does it, which comes with onnxruntime.

Our descriptors list only the fields of onnx.proto that are used here; protobuf preserves all others. This module knows names,
fields and bytes, not what a graph means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from personalq.bundle import inside
from personalq.errors import BundleError
from personalq.numerics import unpack_int4

# message -> (field, number, type, how many)
_MESSAGES: dict[str, tuple[tuple[str, int, str, str], ...]] = {
    "Model": (("graph", 7, "Graph", "optional"),),
    "Graph": (
        ("node", 1, "Node", "repeated"),
        ("initializer", 5, "Tensor", "repeated"),
        ("input", 11, "Value", "repeated"),
        ("output", 12, "Value", "repeated"),
    ),
    "Node": (
        ("input", 1, "string", "repeated"),
        ("output", 2, "string", "repeated"),
        ("name", 3, "string", "optional"),
        ("op_type", 4, "string", "optional"),
        ("attribute", 5, "Attribute", "repeated"),
    ),
    "Attribute": (
        ("name", 1, "string", "optional"),
        ("i", 3, "int64", "optional"),
        ("s", 4, "bytes", "optional"),
        ("ints", 8, "int64", "repeated"),
        ("type", 20, "int32", "optional"),
    ),
    "Tensor": (
        ("dims", 1, "int64", "repeated"),
        ("data_type", 2, "int32", "optional"),
        ("name", 8, "string", "optional"),
        ("raw_data", 9, "bytes", "optional"),
        ("external_data", 13, "Entry", "repeated"),
    ),
    "Entry": (("key", 1, "string", "optional"), ("value", 2, "string", "optional")),
    "Value": (("name", 1, "string", "optional"),),
}
_INT, _INTS = 2, 7  # AttributeProto.type
UINT8, INT8, INT64, INT4 = 2, 3, 7, 22  # TensorProto.data_type
DTYPES: dict[int, Any] = {
    1: np.float32,
    UINT8: np.uint8,
    INT8: np.int8,
    6: np.int32,
    INT64: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
}
Array = npt.NDArray[Any]
Model = Any  # a message "Model": protobuf has no types


@dataclass(frozen=True)
class Node:
    """One node. attributes: the integer ones only."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, int]


@dataclass(frozen=True)
class Tensor:
    """One initializer. raw: its bytes, or None where they are the `length` bytes of `file` from `offset` on."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int
    raw: bytes | None = None

    @property
    def kind(self) -> str:
        """The dtype's name, 'int4' too."""
        if self.dtype == INT4:
            return "int4"
        return np.dtype(DTYPES[self.dtype]).name if self.dtype in DTYPES else f"type {self.dtype}"

    def read(self) -> Array:
        """The values; int4 comes as int8. Raises BundleError for another dtype, and when the bytes are not there."""
        if self.dtype != INT4 and self.dtype not in DTYPES:
            known = ", ".join(np.dtype(kind).name for kind in DTYPES.values())
            raise BundleError(f"{self.name}: must be {known} or int4, got {self.kind}; export the checkpoint again")
        raw, count = self.read_bytes(), int(np.prod(self.shape, dtype=np.int64))
        wanted = (count + 1) // 2 if self.dtype == INT4 else count * np.dtype(DTYPES[self.dtype]).itemsize
        if len(raw) != wanted:
            raise BundleError(
                f"{self.name}: must be {count} values of {self.kind} in {self.file.name}, got {len(raw)} bytes; "
                "export the checkpoint again"
            )
        if self.dtype == INT4:
            return unpack_int4(np.frombuffer(raw, np.uint8), self.shape)
        return np.frombuffer(raw, DTYPES[self.dtype]).reshape(self.shape)

    def read_bytes(self) -> bytes:
        """The values as they are stored; fewer where the file ends before."""
        if self.raw is not None:
            return self.raw
        with self.file.open("rb") as opened:
            opened.seek(self.offset)
            return opened.read(self.length)


@dataclass(frozen=True)
class Graph:
    """Nodes in file order, initializers by name, and the names of inputs and outputs."""

    path: Path
    nodes: tuple[Node, ...]
    tensors: dict[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @cached_property
    def producers(self) -> dict[str, Node]:
        return {output: node for node in self.nodes for output in node.outputs}

    @cached_property
    def readers(self) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                found.setdefault(value, []).append(node)
        return found

    def constant(self, value: str) -> Array | None:
        """The array behind a value name, or None when it is computed."""
        return self.tensors[value].read() if value in self.tensors else None


def read_graph(path: Path) -> Graph:
    """Parse one ONNX file. Raises BundleError when it is not one."""
    graph = read_model(path).graph
    try:
        nodes = tuple(
            Node(
                node.name,
                node.op_type,
                tuple(node.input),
                tuple(node.output),
                {told.name: told.i for told in node.attribute if told.HasField("i")},
            )
            for node in graph.node
        )
        tensors = {tensor.name: _tensor(path, tensor) for tensor in graph.initializer}
    except (KeyError, ValueError) as error:  # external data that lacks a value, or has a wrong one
        raise BundleError(f"{path.name}: must be an ONNX graph, got {error}; export the checkpoint again") from error
    if not nodes:
        raise BundleError(f"{path.name}: must be an ONNX graph, got no node; export the checkpoint again")
    inputs, outputs = (tuple(value.name for value in values) for values in (graph.input, graph.output))
    return Graph(path, nodes, tensors, inputs, outputs)


def _tensor(path: Path, tensor: Any) -> Tensor:
    shape, where = tuple(tensor.dims), external_data(tensor)
    if not where:
        return Tensor(tensor.name, tensor.data_type, shape, path, 0, len(tensor.raw_data), tensor.raw_data)
    file = inside(path.parent, where["location"])
    return Tensor(tensor.name, tensor.data_type, shape, file, int(where.get("offset", 0)), int(where["length"]))


def external_data(tensor: Any) -> Mapping[str, str]:
    """Where an initializer's bytes lie outside the graph's file: location, offset, length; {} when they are in it."""
    return {entry.key: entry.value for entry in tensor.external_data}


def read_model(path: Path) -> Model:
    """The messages of one ONNX file, to be read and changed. Raises BundleError when it is not one."""
    try:
        return _model_class().FromString(path.read_bytes())
    except DecodeError as error:
        raise BundleError(f"{path.name}: must be an ONNX graph, got {error}; export the checkpoint again") from error


class Edited:
    """A copy of a graph in memory, with more nodes, constants and outputs, and values that have another producer.

    New nodes are appended, whichever node reads them: ONNX Runtime sorts nodes when it opens a graph.
    """

    def __init__(self, graph: Graph) -> None:
        self._model = read_model(graph.path)
        self._producers = {output: node for node in self._model.graph.node for output in node.output}

    def serialized(self) -> bytes:
        """The file."""
        return bytes(self._model.SerializeToString())

    def add_node(self, op: str, inputs: Sequence[str], output: str, **attributes: int | Sequence[int]) -> None:
        """A node with one output and integer attributes."""
        node = self._model.graph.node.add(op_type=op, name=f"added_{output}", input=inputs, output=[output])
        for name, value in attributes.items():
            if isinstance(value, int):
                node.attribute.add(name=name, i=value, type=_INT)
            else:
                node.attribute.add(name=name, ints=value, type=_INTS)

    def add_constant(self, name: str, array: Array) -> None:
        """An initializer of a dtype in DTYPES."""
        dtype = next(code for code, kind in DTYPES.items() if array.dtype == kind)
        raw = np.ascontiguousarray(array).tobytes()
        self._model.graph.initializer.add(name=name, dims=array.shape, data_type=dtype, raw_data=raw)

    def add_output(self, name: str) -> None:
        """An output of the graph, whose type the engine infers."""
        self._model.graph.output.add(name=name)

    def cut_off(self, value: str) -> None:
        """Give a value another name where its node declares it, so that something else may produce it."""
        outputs = self._producers[value].output
        outputs[list(outputs).index(value)] = f"{value}~cut off"


@cache
def _model_class() -> Any:
    """onnx.proto's ModelProto, as far as _MESSAGES tells it."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="personalq/onnx.proto", package="personalq", syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind, label in fields:
            told = message.field.add(name=field_name, number=number, label=field.Label.Value(f"LABEL_{label.upper()}"))
            if kind in _MESSAGES:
                told.type, told.type_name = field.TYPE_MESSAGE, f".personalq.{kind}"
            else:
                told.type = field.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("personalq.Model"))
