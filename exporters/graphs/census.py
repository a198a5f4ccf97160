"""Count what a lowered graph actually contains, layer by layer: read from its nodes, not from what the lowering intended."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from personalq.errors import SpecError
from personalq.spec import LayerSpec

# What a weight may pass through between its initializer and the product.
_WEIGHT_PATH = {"Transpose", "DequantizeLinear", "QuantizeLinear", "Cast", "Reshape"}
_STORED = {ir.DataType.INT8: "int8", ir.DataType.INT4: "int4"}
# How a spec's weight type is stored: 7- and 6-bit weights have no ONNX type and are stored as int8.
STORED_AS = {"int7": "int8", "int6": "int8"}


@dataclass(frozen=True)
class LayerKind:
    """op conv | linear, weight int8 | int4 | float, activation int8 | float."""

    op: str
    weight: str
    activation: str

    def __str__(self) -> str:
        return f"{self.op} {self.weight}/{self.activation}"


def layer_kinds(model: ir.Model) -> dict[str, LayerKind]:
    """layer name -> what the graph does with it, for every Conv, MatMul and Gemm over a checkpoint weight."""
    found = {}
    for node in model.graph:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        weight, path = _weight(node.inputs[1])
        name = weight.name or ""
        if not (weight.is_initializer() and name.endswith(".weight")):
            continue
        stored = _STORED.get(weight.dtype, "float") if "DequantizeLinear" in path else "float"
        op = "conv" if node.op_type == "Conv" else "linear"
        found[name.removesuffix(".weight")] = LayerKind(op, stored, _activation(node.inputs[0]))
    return found


def spec_kinds(layers: Mapping[str, LayerSpec]) -> dict[str, LayerKind]:
    """What the spec asks for, in the words of `layer_kinds`."""
    return {
        name: LayerKind(one.op, STORED_AS.get(one.weight, one.weight), one.activation) for name, one in layers.items()
    }


def count(kinds: Iterable[LayerKind]) -> dict[str, int]:
    """'conv int8/int8' -> number of layers."""
    return dict(sorted(Counter(str(kind) for kind in kinds).items()))


def require_equal(model: ir.Model, layers: Mapping[str, LayerSpec], lowering: str) -> None:
    """Raise SpecError naming the first layer whose precision in the graph is not the spec's."""
    found, wanted = layer_kinds(model), spec_kinds(layers)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            got, must = found.get(name, "nothing"), wanted.get(name, "no such layer")
            raise SpecError(f"{lowering} lowering: {name}: must be {must} as the spec says, got {got}; report this")


def _weight(value: ir.Value) -> tuple[ir.Value, set[str]]:
    path: set[str] = set()
    while (producer := value.producer()) is not None and producer.op_type in _WEIGHT_PATH:
        path.add(producer.op_type)
        value = producer.inputs[0]
    return value, path


def _activation(value: ir.Value) -> str:
    producer = value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return "float"
    source = producer.inputs[0].producer()
    return "int8" if source is not None and source.op_type == "QuantizeLinear" else "float"
