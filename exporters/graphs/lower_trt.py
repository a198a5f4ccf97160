"""The `trt` lowering: family graph + spec -> the graph TensorRT (10.12 to 11) and TensorRT for RTX compile.

Strongly typed float16 around the same integers as `ort`. What the builders require (documented, and compiled with TensorRT
for RTX 1.7.1: docs/tensorrt.md): symmetric constant scales in the type of their input, float bias, no Q/DQ on outputs,
attention left alone. The node of every layer bears the layer's name, so that a builder's report can be held against the spec.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from personalq.errors import SpecError
from personalq.spec import LayerSpec, SpecFile

from ..external_data import Array, StoredTensor, as_float
from .census import count, layer_kinds, require_equal
from .lower_ort import STORAGE, Lowered, integer_weight, tuned
from .passes.adjust import add_low_rank, balance, correct_prediction
from .passes.branches import Branches, add_branches
from .passes.half import HALF, to_half
from .passes.layers import LayerNode, layers_of, split_gemms
from .passes.nodes import Builder, add_initializer
from .passes.rows import assemble_rows, fix_row_count

OPSET = 21  # INT4 and float16 scales; from 23 on an Attention node that cannot be fused fails the build
# Along K of a 4-bit weight without activations in integers: one block as long as K is not fused (unpacked at every run).
BLOCKS = (128, 64, 80, 32, 16)
Quantised = dict[tuple[ir.Value, float], ir.Value]  # (value, scale) -> its dequantised int8 form


def lower_unet_trt(model: ir.Model, spec_file: SpecFile, rank: int = 0) -> Lowered:
    """Apply a spec to the family's UNet graph (edited in place). Raises SpecError when the two do not fit.

    rank: of the adapters that the layers of `branches.NARROW` take; 0: none. Shapes are static in a plan, so it is one number.
    Ensures: opset 21, only float16 and int8/int4 arithmetic (float32 for a float32 reference), and the spec's census.
    """
    spec = spec_file.spec
    dtype = STORAGE[spec.storage]
    model.graph.opset_imports[""] = OPSET
    fix_row_count(model)
    split_gemms(model)
    layers = layers_of(model, spec)
    if dtype == HALF:
        _make_half(model, keep_rows=spec.is_float)
    if not spec.is_float:
        assemble_rows(model, spec.rows.layers, spec.rows.kept.slots, dtype)
    units = _units(layers, spec_file)
    branches = Branches(rank=rank, is_dequantised=True)
    lowered, quantised = Lowered(model, [], places=branches.places(layers) if rank else {}), Quantised()
    for name, layer in layers.items():
        layer.node.name = name
        decision = spec.layers[name]
        if decision.weight == "float":
            lowered.unquantised[name] = decision.reason
            continue
        quantise = _Layer(Builder(model.graph, name), layer, decision, spec_file.tensors, dtype)
        lowered.tensors += quantise.run(quantised, units.get(name))
    add_branches(model, layers, lowered.places, branches, dtype)
    if spec.corrected:  # float32, after the float16 prediction
        correct_prediction(model, spec_file.tensors["correction.gain"], spec_file.tensors["correction.mean"])
    RemoveUnusedNodesPass()(model)
    floats = _floats(model, {tensor.name for tensor in lowered.tensors}, dtype)
    lowered.tensors += [tuned(tensor, spec_file) for tensor in floats]
    model.graph.sort()
    require_equal(model, spec.layers, "trt")
    lowered.census = count(layer_kinds(model).values())
    return lowered


def _make_half(model: ir.Model, *, keep_rows: bool) -> None:
    """float16 throughout; the input `rows` too, unless it stays an input (float32, as every graph input)."""
    rows = next(value for value in model.graph.inputs if value.name == "rows")
    if not keep_rows:
        rows.type = ir.TensorType(HALF)
    to_half(model)


def _units(layers: dict[str, LayerNode], spec_file: SpecFile) -> dict[str, np.float32]:
    """One power of two for the weights of all layers that share an input: at least the largest of their scales.

    A power of two so that float16 holds it exactly; shared so that to_q, to_k and to_v can become one product.
    """
    tensors, largest = spec_file.tensors, dict[tuple[ir.Value, float, str], float]()
    keys = {}
    for name, layer in layers.items():
        decision = spec_file.spec.layers[name]
        if decision.weight == "float" or decision.activation == "float":
            continue
        own = name if decision.balanced else ""  # a balanced layer has an input of its own
        keys[name] = key = (layer.node.inputs[0], float(tensors[f"{name}.input_scale"]), own)
        largest[key] = max(largest.get(key, 0.0), float(np.max(tensors[f"{name}.weight_scale"])))
    return {name: np.float32(2.0 ** np.ceil(np.log2(largest[key]))) for name, key in keys.items()}


class _Layer:
    """One layer while it is being quantised."""

    def __init__(
        self, build: Builder, layer: LayerNode, decision: LayerSpec, tensors: dict[str, Array], dtype: ir.DataType
    ) -> None:
        self.build, self.layer, self.decision, self.tensors = build, layer, decision, tensors
        self.dtype, self.type = dtype, np.float16 if dtype == HALF else np.float32
        self.scale = np.asarray(tensors[f"{layer.name}.weight_scale"], np.float32)

    def run(self, quantised: Quantised, unit: np.float32 | None) -> list[StoredTensor]:
        """Put Q/DQ around the layer; return what is to be stored: its integers, and a low-rank branch if it has one."""
        node = self.layer.node
        branch = self._adjust()
        stored = integer_weight(self.layer, self.decision, self.tensors)
        weight = add_initializer(self.build.graph, stored.name, ir.tensor(np.zeros(1, np.int8), name=stored.name))
        weight.type = ir.TensorType(stored.dtype)
        if unit is None:
            node.replace_input_with(1, self._weight_only(weight, stored.shape))
            return [stored, *branch]
        scale = self._constant(np.float32(self.tensors[f"{self.layer.name}.input_scale"]), "input_scale")
        node.replace_input_with(0, self._input(node.inputs[0], scale, quantised))
        self._product(node, weight, unit)
        return [stored, *branch]

    def _adjust(self) -> list[StoredTensor]:
        """A low-rank branch over the input as it is, then the balanced input."""
        name, branch = self.layer.name, []
        if self.decision.low_rank:
            parts = (self.tensors[f"{name}.{part}"] for part in ("low_rank_down", "low_rank_up"))
            branch = add_low_rank(self.build, self.layer, *parts, self.dtype)
        if self.decision.balanced:
            vector = self.tensors[f"{name}.input_balance"]
            self.layer.node.replace_input_with(0, balance(self.build, self.layer, vector, self.dtype))
        return branch

    def _constant(self, value: Array, what: str) -> ir.Value:
        """A scale in the graph's type; float16 must hold it as a number above 0."""
        array = np.asarray(value).astype(self.type)
        if not (np.isfinite(array).all() and (array > 0).all()):
            worst = float(np.min(value)) if not (array > 0).all() else float(np.max(value))
            raise SpecError(
                f"{self.layer.name}.{what}: scale must be > 0 and < 65504 in float16, got {worst}; exclude the layer"
            )
        return self.build.constant(array)

    def _input(self, value: ir.Value, scale: ir.Value, quantised: Quantised) -> ir.Value:
        key = (value, float(scale.const_value.numpy()))
        if key not in quantised:
            zero = self.build.constant(np.array(0, np.int8))
            integers = self.build("QuantizeLinear", value, scale, zero)
            quantised[key] = self.build("DequantizeLinear", integers, scale, zero)
        return quantised[key]

    def _product(self, node: ir.Node, weight: ir.Value, unit: np.float32) -> None:
        """int8 x int8 with one scale for the whole weight, then each channel's own factor (<= 1), then the bias.

        With per-channel scales in the DequantizeLinear the RTX builder writes a matrix product in float16 *before* the
        channel scale, value / scale, which does not fit; and a convolution in float32. This way both are float16, and fit.
        """
        node.replace_input_with(1, self._integers(weight, unit))
        side = (-1, 1, 1) if self.layer.op == "conv" else (-1,)
        factor = self._constant((self.scale / unit).reshape(side), "weight_scale")
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        old = node.outputs[0]
        readers = [(use.node, use.idx) for use in old.uses()]
        result = self.build("Mul", old, factor)
        if bias is not None:
            node.resize_inputs(2)
            sides = self.build.constant(np.array([1, 2], np.int64))
            result = self.build("Add", result, self.build("Unsqueeze", bias, sides))
        for reader, index in readers:
            reader.replace_input_with(index, result)

    def _integers(self, weight: ir.Value, unit: np.float32) -> ir.Value:
        """The weight as int8 times unit. 4-bit weights become int8 on the way, doubled: the builder refuses int4 with one
        scale under int8 activations, and a Dequantize and a Quantize of the same scale, which cancel out."""
        zero = self.build.constant(np.array(0, np.int8))
        if self.decision.weight == "int4":
            two, one = (self.build.constant(np.array(value, self.type)) for value in (2, 1))
            whole = self.build("DequantizeLinear", weight, two)
            weight, unit = self.build("QuantizeLinear", whole, one, zero), unit / np.float32(2)
        return self.build("DequantizeLinear", weight, self._constant(unit, "weight_scale"), zero)

    def _weight_only(self, weight: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """Integers at rest, float products. 4-bit Linear weights get their scale in blocks along K, shorter than K."""
        scale = self.scale
        if self.decision.weight != "int4" or self.layer.op == "conv":
            axis = 0 if self.layer.op == "conv" else 1
            return self.build("DequantizeLinear", weight, self._constant(scale, "weight_scale"), axis=axis)
        k = shape[0]
        block = self.decision.group if self.decision.group and self.decision.group < k else _block(k)
        if scale.ndim == 1 or scale.shape[1] == 1:  # one scale per output channel: said once per block
            scale = np.repeat(scale.reshape(-1, 1), k // block, axis=1)
        blocks = self._constant(np.ascontiguousarray(scale.T), "weight_scale")
        return self.build("DequantizeLinear", weight, blocks, axis=0, block_size=block)


def _block(k: int) -> int:
    """The longest block that divides K and is shorter; K itself where none is."""
    return next((block for block in BLOCKS if k % block == 0 and block < k), k)


def _floats(model: ir.Model, done: set[str], dtype: ir.DataType) -> list[StoredTensor]:
    """Every checkpoint tensor that is read and not stored yet, in the graph's float type."""
    graph, tensors = model.graph, []
    for name in [n for n in graph.initializers if isinstance(graph.initializers[n].const_value, ir.ExternalTensor)]:
        value = graph.initializers[name]
        if name in done:
            continue
        if not list(value.uses()):
            del graph.initializers[name]
            continue
        shape = tuple(int(n) for n in value.shape.numpy())
        tensors.append(as_float(name, shape, dtype))
    return tensors
