"""The `ort` lowering: family graph + spec -> the graph ONNX Runtime's CPU provider (and OpenVINO) run in integers.

FP32 around int8. What the kernels require (measured with ONNX Runtime 1.32): explicit zero points; a Conv fuses into
QLinearConv only when its output is quantised too; a Linear is MatMul + Add, never Gemm (see runtime.engines.engine for the
optimiser that must stay off). Attention products stay float: that is faster, and keeps the trigger's attention exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from personalq.bundle import BranchPlace
from personalq.numerics import QTYPES, quantize
from personalq.spec import LayerSpec, SpecFile

from ..external_data import Array, StoredTensor, as_float
from .passes.adjust import add_low_rank, balance, correct_prediction
from .passes.attention import fuse_attention
from .passes.branches import Branches, add_branches
from .passes.layers import LayerNode, layers_of, split_gemms
from .passes.nodes import Builder, add_initializer
from .passes.rows import assemble_rows

Quantised = dict[tuple[int, float], ir.Value]  # (value, scale) -> its int8 form
STORAGE = {"float16": ir.DataType.FLOAT16, "float32": ir.DataType.FLOAT}


@dataclass
class Lowered:
    """A graph ready to be written, the tensors it needs, what became of each layer, and which ones take an adapter."""

    model: ir.Model
    tensors: list[StoredTensor]
    census: dict[str, int] = field(default_factory=dict)
    unquantised: dict[str, str] = field(default_factory=dict)
    places: dict[str, BranchPlace] = field(default_factory=dict)


def lower_unet(
    model: ir.Model,
    spec_file: SpecFile,
    entrance: Callable[[ir.Model], None] | None = None,
    branches: Branches | None = None,
) -> Lowered:
    """Apply a spec to the family's UNet graph (edited in place). Raises SpecError when the two do not fit.

    entrance: what takes the place of the input `rows`; None: text rows in storage form, or `rows` itself in a reference.
    branches: which layers take an adapter; None: it is merged.
    """
    spec = spec_file.spec
    split_gemms(model)
    layers = layers_of(model, spec)
    lowered = Lowered(model, [], places=branches.places(layers) if branches else {})
    quantised: Quantised = {}
    for name, layer in layers.items():
        decision = spec.layers[name]
        key = f"{decision.op} {decision.weight}/{decision.activation}"
        lowered.census[key] = lowered.census.get(key, 0) + 1
        if decision.weight == "float":
            lowered.unquantised[name] = decision.reason
            continue
        lowered.tensors += _quantise(model, layer, decision, spec_file, quantised)
    if entrance is not None:
        entrance(model)
    elif not spec.is_float:
        assemble_rows(model, spec.rows.layers, spec.rows.kept.slots)
    if not spec.is_float:  # the reference stays as it was traced
        fuse_attention(model)
    if branches is not None:
        add_branches(model, layers, lowered.places, branches)
    if spec.corrected:
        correct_prediction(model, spec_file.tensors["correction.gain"], spec_file.tensors["correction.mean"])
    RemoveUnusedNodesPass()(model)
    floats = store_floats(model, {t.name for t in lowered.tensors}, STORAGE[spec.storage])
    lowered.tensors += [tuned(tensor, spec_file) for tensor in floats]
    model.graph.sort()
    return lowered


def _quantise(
    model: ir.Model,
    layer: LayerNode,
    decision: LayerSpec,
    spec_file: SpecFile,
    quantised: Quantised,
) -> list[StoredTensor]:
    """Put Q/DQ around one layer; return what it stores: the integers, and a low-rank branch where the spec has one."""
    tensors, node = spec_file.tensors, layer.node
    build = Builder(model.graph, layer.name)
    branch = []
    if decision.low_rank:
        low_rank = (tensors[f"{layer.name}.{part}"] for part in ("low_rank_down", "low_rank_up"))
        branch = add_low_rank(build, layer, *low_rank)
    if decision.balanced:
        node.replace_input_with(0, balance(build, layer, tensors[f"{layer.name}.input_balance"]))
    if decision.activation == "int8":
        scale = np.float32(tensors[f"{layer.name}.input_scale"])
        node.replace_input_with(0, quantise_dequantise(build, node.inputs[0], scale, quantised))
    stored = integer_weight(layer, decision, tensors)
    weight = add_initializer(model.graph, stored.name, ir.tensor(np.zeros(1, np.int8), name=stored.name))
    if stored.dtype == ir.DataType.INT4:
        model.graph.opset_imports[""] = 21
        if decision.group is None:  # folded to int8 when the session opens, so kernels stay integer
            weight = build("Cast", weight, to=ir.DataType.INT8)
    node.replace_input_with(1, _dequantised(build, layer, weight, np.asarray(tensors[f"{layer.name}.weight_scale"])))
    if layer.op == "conv" and decision.activation == "int8":
        _quantise_output(build, node, np.float32(tensors[f"{layer.name}.output_scale"]))
    return [stored, *branch]


def _dequantised(build: Builder, layer: LayerNode, weight: ir.Value, scale: Array) -> ir.Value:
    """The stored integers times their scales: per output channel, or in blocks along K (ONNX Runtime: MatMulNBits)."""
    if scale.ndim == 2:
        blocks = build.constant(np.ascontiguousarray(scale.T, np.float32))
        length = int(layer.weight.shape.numpy()[1]) // scale.shape[1]
        return build("DequantizeLinear", weight, blocks, axis=0, block_size=length)
    scale_value = build.constant(np.asarray(scale, np.float32))
    zero = build.constant(np.zeros(scale_value.shape.numpy(), np.int8))
    return build("DequantizeLinear", weight, scale_value, zero, axis=0 if layer.op == "conv" else 1)


def tuned(tensor: StoredTensor, spec_file: SpecFile) -> StoredTensor:
    """The tensor with the spec's values in place of the checkpoint's, in its own type, where calibration tuned it."""
    if tensor.name not in spec_file.spec.tuned:
        return tensor
    values = spec_file.tensors[f"{tensor.name}.tuned"].astype(tensor.dtype.numpy())
    return replace(tensor, given=values)


def quantise_dequantise(build: Builder, value: ir.Value, scale: np.float32, quantised: Quantised) -> ir.Value:
    """value -> QuantizeLinear -> DequantizeLinear: the spec's symmetric int8, written as uint8 with zero point 128.

    x64 kernels multiply unsigned activations with signed weights. ONNX Runtime turns int8 into that by itself only where
    a Quantize has one reader; to_q, to_k and to_v share theirs and would silently run in float (measured, 1.32).
    """
    scale_value, zero = build.constant(np.asarray(scale)), build.constant(np.array(128, np.uint8))
    key = (id(value), float(scale))
    if key not in quantised:
        quantised[key] = build("QuantizeLinear", value, scale_value, zero)
    return build("DequantizeLinear", quantised[key], scale_value, zero)


def _quantise_output(build: Builder, node: ir.Node, scale: np.float32) -> None:
    old = node.outputs[0]
    readers = [(use.node, use.idx) for use in old.uses()]
    result = quantise_dequantise(build, old, scale, {})
    for reader, index in readers:
        reader.replace_input_with(index, result)
    if old in build.graph.outputs:
        result.name, old.name = old.name, f"{old.name}_float"
        result.type, result.shape = old.type, old.shape
        build.graph.outputs[list(build.graph.outputs).index(old)] = result


def integer_weight(layer: LayerNode, decision: LayerSpec, tensors: dict[str, Array]) -> StoredTensor:
    """The integers of one layer: Conv as [O,I,kh,kw], Linear as [K,N] (transposed), scales per output channel.

    Rounding 'nearest' is numerics.quantize; 'stored' integers were learnt by calibration and come with the spec.
    """
    name, qtype = f"{layer.name}.weight", QTYPES[decision.weight]
    scale = tensors[f"{layer.name}.weight_scale"]
    shape = tuple(int(n) for n in layer.weight.shape.numpy())

    def integers(rows: Array, start: int) -> Array:
        some = slice(start, start + len(rows))
        if decision.rounding == "stored":
            return tensors[f"{layer.name}.weight_q"][some]
        return quantize(rows, scale[some], qtype, 0)

    dtype, is_linear = ir.DataType.INT4 if decision.weight == "int4" else ir.DataType.INT8, layer.op == "linear"
    return StoredTensor(name, name, dtype, shape[::-1] if is_linear else shape, integers, is_transposed=is_linear)


def store_floats(model: ir.Model, done: set[str], storage: ir.DataType) -> list[StoredTensor]:
    """Every checkpoint tensor not stored yet: matrices as `storage` (a Cast brings FP16 back to FP32), vectors as FP32."""
    graph, tensors = model.graph, []
    for name in [n for n in graph.initializers if "." in n and n not in done and _is_checkpoint(graph.initializers[n])]:
        value = graph.initializers[name]
        if not list(value.uses()):
            del graph.initializers[name]
            continue
        shape = tuple(int(n) for n in value.shape.numpy())
        dtype = storage if len(shape) > 1 else ir.DataType.FLOAT
        if dtype == ir.DataType.FLOAT16:
            readers = [(use.node, use.idx) for use in value.uses()]
            wide = Builder(graph, f"{name}.cast")("Cast", value, to=ir.DataType.FLOAT)
            for reader, index in readers:
                reader.replace_input_with(index, wide)
        tensors.append(as_float(name, shape, dtype))
    return tensors


def _is_checkpoint(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor)
