"""Rules about graphs that build but waste time: float where integers were intended, weights unpacked at every run."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from .view import MOVES, PRODUCTS, D, View

Problem = tuple[str, str, str]

_NARROW = 16
_EPILOGUE = {"Add", "Mul"} | MOVES


def _weights(view: View, *operators: str) -> Iterator[tuple[ir.Node, ir.Node, ir.Value, ir.Node | None]]:
    """(product, its weight's DequantizeLinear, the integers, the activation's DequantizeLinear or None)."""
    for node in view.nodes(*(operators or PRODUCTS)):
        weight = view.weight(node)
        if weight is not None and weight.dequantize is not None:
            yield node, weight.dequantize, weight.value, view.activation(node)


def _weight_only(view: View, *operators: str) -> Iterator[tuple[ir.Node, ir.Node, ir.Value]]:
    """Products of integer weights with a float input: (product, DequantizeLinear, integers)."""
    return (found[:3] for found in _weights(view, *operators) if found[3] is None)


def _under_int8(view: View, *operators: str) -> Iterator[tuple[ir.Node, ir.Node, ir.Value]]:
    """Products of integer weights with a quantised input: (product, DequantizeLinear, integers)."""
    return (found[:3] for found in _weights(view, *operators) if found[3] is not None)


def channel_activations(view: View) -> Iterator[Problem]:
    for node in view.nodes("QuantizeLinear"):
        scale = view.shape(node.inputs[1])
        if scale is not None and int(np.prod(scale)) > 1 and not view.is_constant(node.inputs[0]):
            yield (
                str(node.name),
                "activations need one scale, got one per channel (no int8 product)",
                "use one per tensor",
            )


def weight_axes(view: View) -> Iterator[Problem]:
    """One scale per output channel: axis 0 of Conv and of Gemm transB=1 or a transposed weight, axis 1 of MatMul [K,N]."""
    for node, dequantize, integers, _ in _weights(view):
        scale, weight = view.shape(dequantize.inputs[1]), view.weight(node)
        if scale is None or len(scale) != 1 or scale[0] < 2 or weight is None:
            continue
        rank = len(view.shape(integers) or (0, 0))
        axis = dequantize.attributes["axis"].as_int() if "axis" in dequantize.attributes else 1
        flipped = weight.is_transposed ^ (node.op_type == "Gemm" and _flag(node, "transB"))
        must = 0 if node.op_type == "Conv" or flipped else rank - 1
        if axis % rank != must:
            what = f"scales must lie along axis {must} (output channels), got axis {axis}"
            yield str(node.name), f"{what}: applied in float16, no int8 product", "use one scale per output channel"


def half_quantised(view: View) -> Iterator[Problem]:
    for node in view.nodes(*PRODUCTS):
        weight, activation = view.weight(node), view.activation(node)
        if weight is not None and weight.dequantize is None and activation is not None:
            yield (
                str(node.name),
                "its input is quantised and its weight is not: runs in float",
                "quantise both or neither",
            )


def quantised_outputs(view: View) -> Iterator[Problem]:
    """A pair belongs before the input of a product; on an output it costs accuracy and splits what would be fused."""
    for node in view.nodes("QuantizeLinear"):
        if view.is_constant(node.inputs[0]) or not _from_product(view, node.inputs[0]):
            continue
        dequantised = [one for one in view.readers(node.outputs[0]) if one.op_type == "DequantizeLinear"]
        readers = [one for pair in dequantised for one in view.readers(pair.outputs[0])]
        if readers and not any(one.op_type in PRODUCTS for one in readers):
            got = sorted({one.op_type for one in readers})[0]
            yield str(node.name), f"Q/DQ on the output of a product, read by {got}", "remove the pair"


def _from_product(view: View, value: ir.Value) -> bool:
    while (node := value.producer()) is not None and node.op_type in _EPILOGUE:
        value = next((one for one in node.inputs if one is not None and not view.is_constant(one)), node.inputs[0])
    return node is not None and node.op_type in PRODUCTS and view.weight(node) is not None


def _attention_products(view: View) -> Iterator[ir.Node]:
    """Products of two computed values. One that is fed, as an adapter's matrices are, makes another product of it."""
    for node in view.nodes("MatMul"):
        fed = [view.is_input(value) for value in node.inputs]
        if view.weight(node) is None and fed in ([False, False], [True, True]):
            yield node


def quantised_attention(view: View) -> Iterator[Problem]:
    for node in _attention_products(view):
        if any(view.producer(value, "DequantizeLinear") is not None for value in node.inputs):
            yield (
                str(node.name),
                "Q/DQ on an attention product breaks the fused attention kernel",
                "leave it in float16",
            )


def wide_attention(view: View) -> Iterator[Problem]:
    for node in _attention_products(view):
        if view.type(node.inputs[0]) == D.FLOAT and any(
            one.op_type == "Softmax" for one in view.readers(node.outputs[0])
        ):
            yield str(node.name), "attention in float32 is not fused (22 times the activation memory)", "use float16"


def unfused_blocks(view: View) -> Iterator[Problem]:
    """int4 over one block as long as K, or per channel, is unpacked to float16 by a kernel of its own at every run."""
    for node, dequantize, integers in _weight_only(view, "MatMul", "Gemm"):
        scale, data = view.shape(dequantize.inputs[1]), view.shape(integers)
        if view.type(integers) != D.INT4 or scale is None or data is None:
            continue
        if len(scale) < 2 or scale == data or 1 in scale:
            what = f"int4 weights without blocks shorter than K (scales {scale}): not fused"
            yield str(node.name), what, "use blocks of 64 or 128"


def expanded_convolutions(view: View) -> Iterator[Problem]:
    for node, _, integers in _weight_only(view, "Conv"):
        what = f"{view.types[integers].name} weights without int8 activations are unpacked at every run"
        yield str(node.name), what, "quantise its input too"


def narrow_convolutions(view: View) -> Iterator[Problem]:
    for node, _, integers in _under_int8(view, "Conv"):
        shape = view.shape(integers)
        if shape is not None and min(shape[:2]) < _NARROW:
            what = f"int8 convolution over {shape[1]} and {shape[0]} channels"
            yield str(node.name), f"{what}: TensorRT has no fast kernel below {_NARROW}", "leave it in float16"


def channel_scales(view: View) -> Iterator[Problem]:
    """TensorRT for RTX writes such a product before the channel scale: value / scale, in float16 for a matrix product."""
    for node, dequantize, integers in _under_int8(view, "Conv", "MatMul", "Gemm"):
        scale = view.constant(dequantize.inputs[1])
        if scale is None or scale.size < 2 or view.type(integers) not in (D.INT8, D.INT4):
            continue
        where = "writes float32" if node.op_type == "Conv" else "can overflow float16"
        fix = "use one scale for the weight and multiply the product by each channel's factor"
        yield str(node.name), f"per-channel scales under int8 activations: the product {where}", fix


def packed_constants(view: View) -> Iterator[Problem]:
    for name, value in view.graph.initializers.items():
        shape = view.shape(value)
        if view.type(value) in (D.UINT8, D.BOOL) and shape is not None and int(np.prod(shape)) > 1:
            got = view.types[value].name
            yield (
                name,
                f"{got} constants are no TensorRT type (packed nibbles are folded to float16)",
                "store INT4 or INT8",
            )


def int8_casts(view: View) -> Iterator[Problem]:
    for node in view.nodes("Cast"):
        if view.type(node.inputs[0]) == D.INT8 and not node.inputs[0].is_initializer():
            yield (
                str(node.name),
                "TensorRT lists no Cast from int8 (TensorRT for RTX takes it)",
                "use DequantizeLinear, scale 1",
            )


def half_sines(view: View) -> Iterator[Problem]:
    for node in view.nodes("Sin", "Cos"):
        if view.type(node.inputs[0]) in (D.FLOAT16, D.BFLOAT16):
            yield (
                str(node.name),
                "the time embedding has no correct digit in float16",
                "keep it in float32 up to its Linear",
            )


def _flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())
