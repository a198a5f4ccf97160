"""The lint: a clean graph gives nothing, and a graph broken in one way gives that rule, with the node's name and a fix."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from ml_dtypes import float8_e4m3fn, float8_e5m2, int4, uint4
from onnx import TensorProto, helper, numpy_helper

from exporters.lint import Finding, lint_trt
from exporters.lint.rules import ERRORS, WARNINGS
from personalq.errors import BundleError

HALF, FLOAT, INT8 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT8
K, N, C = 64, 32, 32


class Graph:
    """A graph in the making. Constants are float16 unless they say otherwise; `x` (2,64) and `image` (1,32,8,8) enter."""

    def __init__(self, opset: int = 21) -> None:
        self.opset, self.nodes, self.constants = opset, [], []
        self.inputs = {"x": (HALF, [2, K]), "image": (HALF, [1, C, 8, 8]), "wide": (FLOAT, [2, K])}

    def constant(self, name: str, value, dtype=np.float16) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value).astype(dtype), name))
        return name

    def op(self, operator: str, *inputs: str, name: str = "", outputs: int = 1, **attributes) -> str:
        name = name or f"n{len(self.nodes)}"
        made = [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), made, name=name, **attributes))
        return made[0]

    def scale(self, value, dtype=np.float16) -> str:
        return self.constant(f"s{len(self.constants)}", value, dtype)

    def zero(self, value=0, dtype=np.int8) -> str:
        return self.constant(f"z{len(self.constants)}", value, dtype)

    def pair(self, value: str, scale: str = "", zero: str = "", name: str = "pair") -> str:
        """value -> Quantize -> Dequantize."""
        scale, zero = scale or self.scale(0.1), zero or self.zero()
        return self.op("DequantizeLinear", self.op("QuantizeLinear", value, scale, zero, name=name), scale, zero)

    def weight(self, shape=(K, N), scale=0.25, dtype=np.int8, **attributes) -> str:
        """Integers -> Dequantize, named 'expand'."""
        integers = self.constant("w.weight", np.resize([1, -2, 3], shape), dtype)
        return self.op("DequantizeLinear", integers, self.scale(scale), name="expand", **attributes)

    def save(self, path: Path) -> Path:
        values = [helper.make_tensor_value_info(name, *kind) for name, kind in self.inputs.items()]
        last = helper.make_tensor_value_info(self.nodes[-1].output[0], HALF, None)
        graph = helper.make_graph(self.nodes, "g", values, [last], self.constants)
        domains = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), path)
        return path


def product(graph: Graph, x: str, weight: str, name: str = "layer") -> None:
    graph.op("MatMul", x, weight, name=name)


def convolution(graph: Graph, x: str, weight: str) -> None:
    graph.op("Conv", x, weight, name="layer", pads=[1, 1, 1, 1])


def good(g: Graph) -> None:
    product(g, g.pair("x"), g.weight())


def bad_zero_point(g: Graph) -> None:
    product(g, g.pair("x", zero=g.zero(128, np.uint8)), g.weight())


def missing_zero_point(g: Graph) -> None:
    scale = g.scale(0.1)
    product(g, g.op("DequantizeLinear", g.op("QuantizeLinear", "x", scale, name="pair"), scale), g.weight())


def unsigned_zero_point(g: Graph) -> None:
    product(g, g.pair("x", zero=g.zero(0, np.uint8)), g.weight())


def integer_bias(g: Graph) -> None:
    bias = g.op("DequantizeLinear", g.constant("b", np.ones(N), np.int32), g.scale(0.1), name="bias")
    g.op("Gemm", g.pair("x"), g.weight(), bias, name="layer")


def zero_scale(g: Graph) -> None:
    product(g, g.pair("x", g.scale(1e-9)), g.weight())


def infinite_scale(g: Graph) -> None:
    product(g, g.pair("x"), g.weight(scale=np.inf))


def run_time_scale(g: Graph) -> None:
    product(g, g.pair("x", g.op("ReduceMax", "x", keepdims=0)), g.weight())


def wide_scale(g: Graph) -> None:
    product(g, g.pair("wide"), g.weight())


def different_scales(g: Graph) -> None:
    product(g, g.pair("wide", g.scale(0.1, np.float32)), g.weight())


def quantised_integer(g: Graph) -> None:
    g.pair(g.op("Cast", "x", to=TensorProto.INT32))


def quantised_scalar(g: Graph) -> None:
    product(g, g.pair(g.constant("one", 1.0)), g.weight())


def block_on_kernel_axis(g: Graph) -> None:
    weight = g.weight((C, C, 2, 2), np.full((C, C // 16, 2, 2), 0.1), int4, axis=1, block_size=16)
    convolution(g, "image", weight)


def blocks_both_ways(g: Graph) -> None:
    product(g, "x", g.weight(scale=np.full((4, 4), 0.1), dtype=int4, axis=0, block_size=16))


def uneven_block(g: Graph) -> None:
    product(g, "x", g.weight(scale=np.full((5, N), 0.1), dtype=int4, axis=0, block_size=13))


def unwritten_block(g: Graph) -> None:
    product(g, "x", g.weight(scale=np.full((4, N), 0.1), dtype=int4, axis=0))


def int8_block(g: Graph) -> None:
    product(g, "x", g.weight(scale=np.full((4, N), 0.1), axis=0, block_size=16))


def blocks_under_int8(g: Graph) -> None:
    product(g, g.pair("x"), g.weight(scale=np.full((4, N), 0.1), dtype=int4, axis=0, block_size=16))


def int4_of_one_scale(g: Graph) -> None:
    product(g, g.pair("x"), g.weight(dtype=int4))


def cancelled(g: Graph) -> None:
    one, zero = g.scale(1), g.zero()
    whole = g.op("DequantizeLinear", g.constant("w.weight", np.ones((K, N)), int4), one)
    integers = g.op("QuantizeLinear", whole, one, zero, name="again")
    product(g, g.pair("x"), g.op("DequantizeLinear", integers, g.scale(0.1), zero))


def int4_convolution(g: Graph) -> None:
    convolution(g, g.pair("image"), g.weight((C, C, 3, 3), dtype=int4))


def cast_constant(g: Graph) -> None:
    product(g, "x", g.op("Cast", g.constant("w", np.ones((K, N)), np.int8), to=HALF))


def arithmetic_on_integers(g: Graph) -> None:
    g.op("Add", g.op("QuantizeLinear", "x", g.scale(0.1), g.zero(), name="integers"), g.constant("i", 1, np.int8))


def odd_count(g: Graph) -> None:
    g.op("DequantizeLinear", g.constant("w", np.ones((5, 5)), int4), g.scale(0.1))


def uint4_constant(g: Graph) -> None:
    g.op("DequantizeLinear", g.constant("w", np.ones((4, 4)), uint4), g.scale(0.1))


def other_fp8(g: Graph) -> None:
    g.op("DequantizeLinear", g.constant("w", np.ones((4, 4)), float8_e5m2), g.scale(0.1))


def fp8_for_ampere(g: Graph) -> None:
    g.op("DequantizeLinear", g.constant("w", np.ones((4, 4)), float8_e4m3fn), g.scale(0.1))


def dynamic_quantisation(g: Graph) -> None:
    g.op("DynamicQuantizeLinear", "wide", outputs=3, name="dynamic")


def contrib(g: Graph) -> None:
    g.op("MatMulNBits", "x", g.constant("w", np.ones((N, 4, 8)), np.uint8), domain="com.microsoft", name="nbits")


def attention_node(g: Graph) -> None:
    g.op("Attention", "x", "x", "x", name="attend")


def types_mixed(g: Graph) -> None:
    g.op("Add", "x", "wide", name="sum")


def second_norm_output(g: Graph) -> None:
    g.op("LayerNormalization", "x", g.constant("one", np.ones(K)), outputs=2, name="norm")
    g.op("Neg", "norm_1")


def cubic_resize(g: Graph) -> None:
    g.op("Resize", "image", "", g.constant("scales", [1, 1, 2, 2], np.float32), mode="cubic", name="up")


def infinite_constant(g: Graph) -> None:
    g.op("Add", "x", g.constant("mask", -np.inf), name="masked")


def channel_activation(g: Graph) -> None:
    product(g, g.pair("x", g.scale(np.full(K, 0.1)), g.zero(np.zeros(K))), g.weight())


def wrong_axis(g: Graph) -> None:
    product(g, g.pair("x"), g.weight(scale=np.full(K, 0.1), axis=0))


def float_weight(g: Graph) -> None:
    product(g, g.pair("x"), g.constant("w.weight", np.ones((K, N))))


def output_pair(g: Graph) -> None:
    product(g, g.pair("x", name="first"), g.weight())
    g.op("Sigmoid", g.pair("layer_0"))


def attention(g: Graph, x: str) -> None:
    products = g.op("MatMul", x, g.op("Transpose", x), name="attend")
    g.op("MatMul", g.op("Softmax", products), x)


def quantised_attention(g: Graph) -> None:
    attention(g, g.pair("x"))


def wide_attention(g: Graph) -> None:
    attention(g, "wide")


def one_block(g: Graph) -> None:
    product(g, "x", g.weight(scale=np.full(N, 0.1), dtype=int4, axis=1))


def weight_only_convolution(g: Graph) -> None:
    convolution(g, "image", g.weight((C, C, 3, 3)))


def narrow_convolution(g: Graph) -> None:
    convolution(g, g.pair("image"), g.weight((4, C, 3, 3)))


def channel_scales(g: Graph) -> None:
    product(g, g.pair("x"), g.weight(scale=np.full(N, 0.1), axis=1))


def nibbles(g: Graph) -> None:
    g.op("Cast", g.constant("packed", np.ones(8), np.uint8), to=HALF)


def int8_cast(g: Graph) -> None:
    g.inputs["rest"] = (INT8, [2, K])
    g.op("Cast", "rest", to=HALF, name="cast")


def half_sine(g: Graph) -> None:
    g.op("Sin", "x", name="sine")


# rule -> (graph, the node the finding must name, words of the message)
BROKEN = [
    ("zero-point", bad_zero_point, "pair", "must be 0, got 128"),
    ("zero-point", missing_zero_point, "pair", "no zero point"),
    ("zero-point", unsigned_zero_point, "pair", "must be int8, got UINT8"),
    ("int32-bias", integer_bias, "bias", "got INT32"),
    ("int32-bias", integer_bias, "layer", "bias must be float"),
    ("scale-sign", zero_scale, "pair", "must be positive, got 0 (float16"),
    ("scale-sign", infinite_scale, "expand", "must be positive"),
    ("scale-run-time", run_time_scale, "pair", "computed at run time"),
    ("scale-type", wide_scale, "pair", "must have the type of its input FLOAT, got FLOAT16"),
    ("scale-pair", different_scales, "layer", "got FLOAT and FLOAT16"),
    ("quantise-input", quantised_integer, "pair", "must read a float, got INT32"),
    ("quantise-input", quantised_scalar, "pair", "must not read a scalar"),
    ("block-axis", block_on_kernel_axis, "expand", "one of the last two axes, got axis 1 of 4"),
    ("block-axis", blocks_both_ways, "expand", "only one axis"),
    ("block-length", uneven_block, "expand", "divide the weight evenly"),
    ("block-length", unwritten_block, "expand", "block_size must be written"),
    ("block-int8", int8_block, "expand", "no int8 in blocks"),
    ("int4-under-int8", blocks_under_int8, "layer", "weights in blocks cannot stand"),
    ("int4-under-int8", int4_convolution, "layer", "convolution weights cannot stand"),
    ("int4-under-int8", int4_of_one_scale, "layer", "weights of one scale cannot stand"),
    ("int4-cancelled", cancelled, "again", "cancels out"),
    ("quantised-use", cast_constant, "w", "may only enter DequantizeLinear, got Cast"),
    ("quantised-use", arithmetic_on_integers, "integers", "Add computes on INT8"),
    ("four-bit-count", odd_count, "w", "even number of values, got 25"),
    ("uint4", uint4_constant, "w", "UINT4"),
    ("fp8-format", other_fp8, "w", "must be E4M3FN"),
    ("hardware-type", fp8_for_ampere, "w", "needs sm89, got sm86 in the list"),
    ("operator", dynamic_quantisation, "dynamic", "DynamicQuantizeLinear is not supported"),
    ("operator", contrib, "nbits", "com.microsoft.MatMulNBits needs a plugin"),
    ("opset", attention_node, "attend", "cannot be fused fails the build"),
    ("mixed-types", types_mixed, "sum", "got FLOAT and FLOAT16"),
    ("layer-norm-outputs", second_norm_output, "norm", "first output"),
    ("resize-mode", cubic_resize, "up", "got cubic"),
    ("half-overflow", infinite_constant, "mask", "must be finite"),
    ("channel-activation", channel_activation, "pair", "one per channel"),
    ("weight-axis", wrong_axis, "layer", "along axis 1 (output channels), got axis 0"),
    ("half-quantised", float_weight, "layer", "runs in float"),
    ("output-quantised", output_pair, "pair", "read by Sigmoid"),
    ("attention-quantised", quantised_attention, "attend", "breaks the fused attention"),
    ("attention-float32", wide_attention, "attend", "not fused"),
    ("block-not-fused", one_block, "layer", "not fused"),
    ("convolution-expanded", weight_only_convolution, "layer", "unpacked at every run"),
    ("narrow-convolution", narrow_convolution, "layer", "over 32 and 4 channels"),
    ("channel-scale", channel_scales, "layer", "can overflow float16"),
    ("packed-nibbles", nibbles, "packed", "no TensorRT type"),
    ("int8-cast", int8_cast, "cast", "no Cast from int8"),
    ("half-sine", half_sine, "sine", "no correct digit"),
]


def findings(break_it, path: Path, opset: int = 21) -> list[Finding]:
    graph = Graph(opset)
    break_it(graph)
    return lint_trt(graph.save(path / "broken.onnx"))


def test_a_good_graph_gives_nothing(tmp_path):
    assert findings(good, tmp_path) == []


@pytest.mark.parametrize(
    ("rule", "break_it", "node", "words"), BROKEN, ids=[f"{r}-{f.__name__}" for r, f, *_ in BROKEN]
)
def test_a_broken_graph_is_caught_with_its_node_and_a_fix(tmp_path, rule, break_it, node, words):
    found = [one for one in findings(break_it, tmp_path) if one.rule == rule and one.node == node]
    assert found, findings(break_it, tmp_path)
    assert words in found[0].message and found[0].fix
    assert found[0].severity == ("warning" if rule in WARNINGS else "error")
    assert found[0].line() == f"{found[0].severity}: {rule}: {node}: {found[0].message}; {found[0].fix}"


def test_every_rule_has_a_broken_graph():
    assert {rule for rule, *_ in BROKEN} == ERRORS.keys() | WARNINGS.keys() | {"hardware-type"}


@pytest.mark.parametrize(
    ("break_it", "opset", "words"), [(one_block, 20, "need opset 21"), (good, 18, "need opset 19")]
)
def test_an_opset_too_old_for_its_types_is_caught(tmp_path, break_it, opset, words):
    assert any(one.rule == "opset" and words in one.message for one in findings(break_it, tmp_path, opset))


def test_types_are_judged_for_the_architectures_asked_for(tmp_path):
    graph = Graph()
    fp8_for_ampere(graph)
    path = graph.save(tmp_path / "fp8.onnx")
    assert [one.rule for one in lint_trt(path, ("sm89", "sm120"))] == []


def test_a_file_that_is_no_graph_is_one_line(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not protobuf")
    with pytest.raises(BundleError, match=r"x.onnx: must be an ONNX graph, got .*; export the checkpoint again"):
        lint_trt(tmp_path / "x.onnx")
