"""Read an ONNX file, and add outputs to it, without onnx: the few protobuf fields that the gate looks at.

It knows fields and bytes (onnx.proto: ModelProto, GraphProto, NodeProto, TensorProto), not what a graph means. Protobuf
merges a message that appears twice, so nodes, initializers and outputs are added by appending a second GraphProto; a
value is cut off its producer by overwriting its name, byte for byte, where that node declares it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.bundle import inside
from personalq.errors import BundleError
from personalq.numerics import unpack_int4

GRAPH = 7  # ModelProto.graph
NODE, INITIALIZER, INPUT, OUTPUT = 1, 5, 11, 12  # GraphProto
INT4 = 22
DTYPES: dict[int, Any] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
}
NAMES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    22: "int4",
}
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Node:
    """One node; `spans`: where in the file each output's name stands. attributes: the integer ones only."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, int]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tensor:
    """One initializer: `file` and `offset` say where its `length` bytes lie."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    file: Path
    offset: int
    length: int

    @property
    def kind(self) -> str:
        return NAMES.get(self.dtype, f"type {self.dtype}")

    def read(self) -> Array:
        """The values; int4 comes as int8. Raises BundleError when the bytes are not there."""
        count = int(np.prod(self.shape, dtype=np.int64))
        itemsize = 0.5 if self.dtype == INT4 else np.dtype(DTYPES[self.dtype]).itemsize
        if self.offset + self.length > self.file.stat().st_size or self.length != -(-count * itemsize // 1):
            raise BundleError(
                f"{self.name}: must be {count} values of {self.kind} in {self.file.name}, got {self.length} bytes; "
                "export the checkpoint again"
            )
        with self.file.open("rb") as opened:
            opened.seek(self.offset)
            raw = opened.read(self.length)
        if self.dtype == INT4:
            return unpack_int4(np.frombuffer(raw, np.uint8), self.shape)
        return np.frombuffer(raw, DTYPES[self.dtype]).reshape(self.shape)


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
    data = path.read_bytes()
    try:
        graphs = [span for number, span, _ in _fields(data, 0, len(data)) if number == GRAPH]
        parts: list[tuple[int, tuple[int, int]]] = [
            (number, span) for start, end in graphs for number, span, _ in _fields(data, start, end)
        ]
        nodes = tuple(_node(data, *span) for number, span in parts if number == NODE)
        tensors = [_tensor(data, path, *span) for number, span in parts if number == INITIALIZER]
        ends = {kind: tuple(_name(data, span) for number, span in parts if number == kind) for kind in (INPUT, OUTPUT)}
    except (IndexError, ValueError, KeyError) as error:
        raise BundleError(f"{path.name}: must be an ONNX graph, got {error}; export the checkpoint again") from error
    if not nodes:
        raise BundleError(f"{path.name}: must be an ONNX graph, got no node; export the checkpoint again")
    return Graph(path, nodes, {tensor.name: tensor for tensor in tensors}, ends[INPUT], ends[OUTPUT])


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, tuple[int, int], int | None]]:
    """(field number, span of its bytes, its value when it is a varint) of one message."""
    at = start
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            first = at
            value, at = _varint(data, at)
            yield tag >> 3, (first, at), value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        else:
            length = {1: 8, 5: 4}[kind]
        if at + length > end:
            raise ValueError("a field that is longer than the file")
        yield tag >> 3, (at, at + length), None
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _text(data: bytes, span: tuple[int, int]) -> str:
    return data[span[0] : span[1]].decode()


def _name(data: bytes, span: tuple[int, int]) -> str:
    return next(_text(data, inner) for number, inner, _ in _fields(data, *span) if number == 1)


def _node(data: bytes, start: int, end: int) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    spans, attributes = [], {}
    for number, span, _ in _fields(data, start, end):
        if number in texts:
            texts[number].append(_text(data, span))
        if number == 2:
            spans.append(span)
        if number == 5:
            inner = {n: (s, v) for n, s, v in _fields(data, *span)}
            if 3 in inner:
                attributes[_text(data, inner[1][0])] = _signed(inner[3][1] or 0)
    name, op = ((texts[n] or [""])[0] for n in (3, 4))
    return Node(name, op, tuple(texts[1]), tuple(texts[2]), attributes, tuple(spans))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _tensor(data: bytes, path: Path, start: int, end: int) -> Tensor:
    shape: list[int] = []
    dtype, name, raw = 0, "", (0, 0)
    external: dict[str, str] = {}
    for number, span, value in _fields(data, start, end):
        if number == 1:
            shape += _packed(data, span) if value is None else [value]
        elif number == 2:
            dtype = value or 0
        elif number == 8:
            name = _text(data, span)
        elif number == 9:
            raw = span
        elif number == 13:
            pair = {n: _text(data, s) for n, s, _ in _fields(data, *span)}
            external[pair[1]] = pair[2]
    if external:
        file = inside(path.parent, external["location"])
        return Tensor(name, dtype, tuple(shape), file, int(external.get("offset", 0)), int(external["length"]))
    return Tensor(name, dtype, tuple(shape), path, raw[0], raw[1] - raw[0])


def _packed(data: bytes, span: tuple[int, int]) -> list[int]:
    at, found = span[0], []
    while at < span[1]:
        value, at = _varint(data, at)
        found.append(value)
    return found


# --- adding to a graph: encoded fields of a second GraphProto


def encode_varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, payload: bytes) -> bytes:
    return encode_varint(number << 3 | 2) + encode_varint(len(payload)) + payload


def new_node(op: str, inputs: Sequence[str], output: str, **attributes: int | Sequence[int]) -> bytes:
    """A node with one output and integer attributes, ready to be appended."""
    body = b"".join(_field(1, value.encode()) for value in inputs)
    body += _field(2, output.encode()) + _field(3, f"gate_{output}".encode()) + _field(4, op.encode())
    for name, value in attributes.items():
        many = not isinstance(value, int)
        numbers = value if not isinstance(value, int) else [value]
        encoded = b"".join(encode_varint((8 if many else 3) << 3) + encode_varint(number) for number in numbers)
        body += _field(5, _field(1, name.encode()) + encoded + encode_varint(20 << 3) + encode_varint(7 if many else 2))
    return _field(NODE, body)


def new_initializer(name: str, array: Array) -> bytes:
    """A constant of a dtype in DTYPES, ready to be appended."""
    dtype = next(code for code, kind in DTYPES.items() if array.dtype == kind)
    dims = b"".join(encode_varint(1 << 3) + encode_varint(side) for side in array.shape)
    body = dims + encode_varint(2 << 3) + encode_varint(dtype) + _field(8, name.encode())
    return _field(INITIALIZER, body + _field(9, np.ascontiguousarray(array).tobytes()))


def new_output(name: str) -> bytes:
    """A graph output whose type the engine infers, ready to be appended."""
    return _field(OUTPUT, _field(1, name.encode()))


def appended(data: bytes, parts: Sequence[bytes]) -> bytes:
    """The model with more nodes, initializers and outputs."""
    return data + _field(GRAPH, b"".join(parts))


def cut_off(data: bytearray, node: Node, value: str, number: int) -> None:
    """Rename output `value` where `node` declares it (same length), so that something else may produce it.

    number: makes the new name differ from all others.
    """
    start, end = node.spans[node.outputs.index(value)]
    data[start:end] = f"~{number}".encode().ljust(end - start, b"~")[: end - start]
