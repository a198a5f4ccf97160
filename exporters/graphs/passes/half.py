"""Convert a float32 graph to a strongly typed float16 one: TensorRT computes in the types written in the graph.

What stays float32: graph inputs and the output (the samplers work in float32), and the sinusoidal embedding of time,
which is all that depends on nothing but `timestep` or `time_ids` (sin(999 * f) has no correct digit in float16).
"""

import numpy as np
import onnx_ir as ir

from personalq.errors import SpecError

from .nodes import Builder, add_initializer

PRECISE_INPUTS = {"timestep", "time_ids"}
HALF, FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT
# Inputs that ONNX wants in float32 whatever the data is: Resize's roi and scales.
FULL_INPUTS = {"Resize": {1, 2}}


def to_half(model: ir.Model) -> None:
    """Make every float32 computation float16, except the time embedding. Edits `model`; checkpoint tensors are retyped.

    Requires: values carry their types (a family graph does). Ensures: inputs and outputs keep their types.
    Raises SpecError when a constant of the graph does not fit float16.
    """
    graph = model.graph
    graph.sort()
    untyped = [v.name for node in graph for v in node.outputs if v.dtype is None and v.uses()]
    assert not untyped, f"every value needs its type before it is narrowed: {untyped[:3]}"
    precise = _precise_values(graph)
    narrow = _Narrower(graph)
    outputs = set(graph.outputs)
    for node in list(graph):
        if not any(_is_float(value) for value in node.outputs) or set(node.outputs) & precise:
            continue
        full = FULL_INPUTS.get(node.op_type, set())
        for index, value in enumerate(node.inputs):
            if value is not None and index not in full and value.dtype == FULL:
                node.replace_input_with(index, narrow(value))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FULL:
            node.attributes["to"] = ir.AttrInt64("to", HALF)
        for value in node.outputs:
            value.dtype = HALF
    for old in outputs:
        if old.dtype == HALF:
            _widen_output(graph, old)
    graph.sort()


class _Narrower:
    """float32 value -> the float16 value to read instead; each is made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.build = graph, Builder(graph, "half")
        self.made: dict[ir.Value, ir.Value] = {}

    def __call__(self, value: ir.Value) -> ir.Value:
        if value.is_initializer() and "." in (value.name or ""):
            value.type = ir.TensorType(HALF)  # a checkpoint tensor: it is stored as float16
            return value
        if value not in self.made:
            self.made[value] = self._constant(value) if value.is_initializer() else self._cast(value)
        return self.made[value]

    def _cast(self, value: ir.Value) -> ir.Value:
        made = self.build("Cast", value, to=HALF)
        made.dtype, made.shape = HALF, value.shape
        return made

    def _constant(self, value: ir.Value) -> ir.Value:
        array = value.const_value.numpy()
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if np.isfinite(array).all() and not np.isfinite(half).all():
            worst = float(np.abs(array).max())
            raise SpecError(f"{value.name}: a constant must fit float16 (65504), got {worst}; export for onnxruntime")
        name = f"{value.name}_half"
        return add_initializer(self.graph, name, ir.tensor(half, name=name))


def _precise_values(graph: ir.Graph) -> set[ir.Value]:
    """Float values that depend on time alone, through no checkpoint tensor."""
    precise = {value for value in graph.inputs if value.name in PRECISE_INPUTS}
    for node in graph:
        floats = [v for v in node.inputs if v is not None and _is_float(v)]
        constants = [v for v in floats if v.is_initializer() and "." not in (v.name or "")]
        if len(floats) > len(constants) and all(v in precise or v in constants for v in floats):
            precise |= {value for value in node.outputs if _is_float(value)}
    return precise


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (FULL, HALF)


def _widen_output(graph: ir.Graph, old: ir.Value) -> None:
    """Cast a float16 graph output back to float32 under its own name."""
    wide = Builder(graph, f"{old.name}.wide")("Cast", old, to=FULL)
    wide.type, wide.shape = ir.TensorType(FULL), old.shape
    index = list(graph.outputs).index(old)
    wide.name, old.name = old.name, f"{old.name}_half"
    graph.outputs[index] = wide
