"""Small building blocks for graph passes over onnx_ir: add an input, a constant, a node, in one line each."""

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def add_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[Any, ...]) -> ir.Value:
    """Append a graph input; shape entries are ints or symbolic dims."""
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a named initializer (replacing one of that name) and return its value."""
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.initializers.pop(name, None)
    graph.register_initializer(value)
    return value


class Builder:
    """Appends nodes named prefix_1, prefix_2, ...; a pass that uses it ends with graph.sort(), which restores a valid order."""

    def __init__(self, graph: ir.Graph, prefix: str):
        self.graph, self.prefix, self.count = graph, prefix, 0
        self.constants: dict[tuple[object, ...], ir.Value] = {}

    def _name(self) -> str:
        self.count += 1
        return f"{self.prefix}_{self.count}"

    def constant(self, array: npt.NDArray[Any]) -> ir.Value:
        """A small constant kept inside the graph file; equal ones of this builder are shared."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.constants:
            name = self._name()
            self.constants[key] = add_initializer(self.graph, name, ir.tensor(array, name=name))
        return self.constants[key]

    def __call__(self, op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Append one node and return its first output."""
        node = ir.node(op, list(inputs), attributes=attributes or None, name=self._name())
        node.outputs[0].name = f"{node.name}_out"
        self.graph.append(node)
        return node.outputs[0]
