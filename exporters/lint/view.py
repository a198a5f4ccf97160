"""A graph as the lint rules see it: the type of every value, what is constant, which nodes are weighted products."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

D = ir.DataType
FLOATS = {D.FLOAT, D.FLOAT16, D.BFLOAT16}
FP8 = {D.FLOAT8E4M3FN, D.FLOAT8E5M2, D.FLOAT8E4M3FNUZ, D.FLOAT8E5M2FNUZ}
# Types that are numbers only together with a scale: legal between Quantize and Dequantize.
QUANTISED = {D.INT8, D.INT4, D.FLOAT4E2M1} | FP8
# Operators that move values and compute nothing.
MOVES = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Slice", "Split", "Concat", "Gather"}
MOVES |= {"GatherND", "GatherElements", "Expand", "Tile", "Pad", "DepthToSpace", "SpaceToDepth"}
PRODUCTS = {"Conv", "ConvTranspose", "MatMul", "Gemm"}
_RESULT = {"Shape": D.INT64, "Size": D.INT64, "NonZero": D.INT64, "ArgMax": D.INT64, "ArgMin": D.INT64}
_RESULT |= dict.fromkeys(
    ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Not", "And", "Or", "Xor"), D.BOOL
)
_RESULT |= {"DynamicQuantizeLinear": D.UINT8, "IsNaN": D.BOOL, "IsInf": D.BOOL}


@dataclass(frozen=True)
class Weight:
    """How a product's weight comes in: its initializer, the DequantizeLinear over it (None: float), Transpose between."""

    value: ir.Value
    dequantize: ir.Node | None
    is_transposed: bool
    is_requantised: bool


class View:
    """One model, read-only, with types inferred from its inputs on. Subgraphs are not entered."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.opset = model.graph.opset_imports.get("", 0)
        self.types: dict[ir.Value, D | None] = {}
        for value in [*self.graph.inputs, *self.graph.initializers.values()]:
            self.types[value] = value.const_value.dtype if value.const_value is not None else value.dtype
        self._constants: set[ir.Value] = set(self.graph.initializers.values())
        for node in self.graph:
            self._infer(node)
            if all(self.is_constant(value) for value in node.inputs):
                self._constants.update(node.outputs)

    @classmethod
    def load(cls, path: Path) -> "View":
        model = ir.load(path)
        model.graph.sort()
        return cls(model)

    def nodes(self, *operators: str) -> Iterator[ir.Node]:
        return (node for node in self.graph if node.op_type in operators)

    def type(self, value: ir.Value | None) -> D | None:
        return None if value is None else self.types.get(value)

    def constant(self, value: ir.Value | None) -> npt.NDArray[Any] | None:
        """The numbers of an initializer or Constant; None when it is computed at run time."""
        if value is None:
            return None
        if value.is_initializer() and value.const_value is not None:
            return np.asarray(value.const_value.numpy())
        producer = value.producer()
        if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
            return np.asarray(producer.attributes["value"].as_tensor().numpy())
        return None

    def is_constant(self, value: ir.Value | None) -> bool:
        """True when nothing that is computed at run time enters it."""
        return value is None or value in self._constants

    def is_input(self, value: ir.Value | None) -> bool:
        """True when a value is one of the graph's inputs, or only moved."""
        while (made := self.producer(value, *MOVES)) is not None:
            value = made.inputs[0]
        return value is not None and value.is_graph_input()

    def shape(self, value: ir.Value) -> tuple[int, ...] | None:
        tensor = value.const_value if value.is_initializer() else None
        return tuple(int(n) for n in tensor.shape.numpy()) if tensor is not None else None

    def producer(self, value: ir.Value | None, *operators: str) -> ir.Node | None:
        """The node that makes a value, if it is one of these operators."""
        node = value.producer() if value is not None else None
        return node if node is not None and node.op_type in operators else None

    def weight(self, node: ir.Node) -> Weight | None:
        """The constant second input of a product; None when it is computed (attention)."""
        value, dequantize, transposed, requantised = node.inputs[1], None, False, False
        if not self.is_constant(value):
            return None
        while (made := self.producer(value, "DequantizeLinear", "QuantizeLinear", *MOVES, "Cast")) is not None:
            if made.op_type == "DequantizeLinear":
                requantised, dequantize = dequantize is not None, dequantize or made
            transposed ^= made.op_type == "Transpose"
            value = made.inputs[0]
        return Weight(value, dequantize, transposed, requantised)

    def activation(self, node: ir.Node) -> ir.Node | None:
        """The DequantizeLinear that feeds a product's first input, when integers enter it."""
        return self.producer(node.inputs[0], "DequantizeLinear")

    def readers(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that read a value, looking through those that only move it."""
        found: list[ir.Node] = []
        for use in value.uses():
            found += self.readers(use.node.outputs[0]) if use.node.op_type in MOVES else [use.node]
        return found

    def _infer(self, node: ir.Node) -> None:
        first = next((self.type(value) for value in node.inputs if value is not None), None)
        result = _RESULT.get(node.op_type, first)
        if node.op_type == "Cast":
            result = D(node.attributes["to"].as_int())
        elif node.op_type == "QuantizeLinear":
            result = self._quantised(node)
        elif node.op_type == "DequantizeLinear":
            result = _attribute(node, "output_dtype") or self.type(node.inputs[1])
        elif node.op_type in ("Where", "Constant", "ConstantOfShape"):
            result = self._of_constant(node)
        for value in node.outputs:
            self.types[value] = result

    def _quantised(self, node: ir.Node) -> D:
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        return self.type(zero) or _attribute(node, "output_dtype") or D.UINT8

    def _of_constant(self, node: ir.Node) -> D | None:
        if node.op_type == "Where":
            return self.type(node.inputs[1])
        value = node.attributes.get("value")
        return value.as_tensor().dtype if value is not None else D.FLOAT


def _attribute(node: ir.Node, name: str) -> D | None:
    found = node.attributes.get(name)
    return D(found.as_int()) if found is not None and found.as_int() else None
