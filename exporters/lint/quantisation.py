"""Rules about Q/DQ that a builder refuses, crashes on, or reads as something else."""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from .view import FLOATS, MOVES, PRODUCTS, QUANTISED, D, View

Problem = tuple[str, str, str]


def _pairs(view: View) -> Iterator[ir.Node]:
    return view.nodes("QuantizeLinear", "DequantizeLinear")


def zero_points(view: View) -> Iterator[Problem]:
    """Non-zero zero point is not supported; a missing one means UINT8 to ONNX and INT8 to TensorRT."""
    for node in _pairs(view):
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is None:
            if node.op_type == "QuantizeLinear" and "output_dtype" not in node.attributes:
                yield (
                    str(node.name),
                    "no zero point means UINT8 to ONNX and INT8 to TensorRT",
                    "give an int8 zero point of 0",
                )
            continue
        number = view.constant(zero)
        if number is None and not view.is_constant(zero):
            yield str(node.name), "zero point must be constant, got a computed one", "make it a constant 0"
        elif number is not None and np.any(number.astype(np.float32)):
            got = int(number.astype(np.float32).ravel()[0])
            yield (
                str(node.name),
                f"zero point must be 0, got {got} ({view.types[zero].name})",
                "quantise symmetrically to int8",
            )
        elif view.type(zero) == D.UINT8:
            yield str(node.name), "zero point must be int8, got UINT8 (read as INT8)", "quantise symmetrically to int8"


def integer_biases(view: View) -> Iterator[Problem]:
    for node in view.nodes("DequantizeLinear"):
        if view.type(node.inputs[0]) in (D.INT32, D.INT16, D.UINT16):
            got = view.types[node.inputs[0]].name
            yield (
                str(node.name),
                f"DequantizeLinear must read int8, int4 or fp8, got {got}",
                "leave the bias in float16",
            )
    for node in view.nodes(*PRODUCTS):
        if len(node.inputs) > 2 and view.producer(node.inputs[2], "DequantizeLinear") is not None:
            yield str(node.name), "bias must be float, got a DequantizeLinear", "leave the bias in float16"


def scale_signs(view: View) -> Iterator[Problem]:
    for node in _pairs(view):
        scale = view.constant(node.inputs[1])
        if scale is None:
            continue
        numbers = scale.astype(np.float64)
        if not (np.isfinite(numbers).all() and (numbers > 0).all()):
            worst = float(numbers.ravel()[np.argmin(np.where(np.isfinite(numbers), numbers, -1.0))])
            small = " (float16 holds nothing below 6e-8)" if worst == 0 and scale.dtype == np.float16 else ""
            yield (
                str(node.name),
                f"scales must be positive, got {worst:g}{small}",
                "raise the scale or leave the layer in float",
            )


def run_time_scales(view: View) -> Iterator[Problem]:
    """On RTX a MatMul silently runs in float16, and a Conv crashes the builder."""
    for node in _pairs(view):
        if not view.is_constant(node.inputs[1]):
            fix = "multiply by 1/s before a constant Q/DQ, and by s after the product"
            yield str(node.name), "scale must be constant, got one computed at run time", fix


def scale_types(view: View) -> Iterator[Problem]:
    for node in view.nodes("QuantizeLinear"):
        data, scale = view.type(node.inputs[0]), view.type(node.inputs[1])
        if data in FLOATS and scale in FLOATS and data != scale:
            yield (
                str(node.name),
                f"scale must have the type of its input {data.name}, got {scale.name}",
                "convert the scale",
            )


def scale_pairs(view: View) -> Iterator[Problem]:
    for node in view.nodes(*PRODUCTS):
        weight, activation = view.weight(node), view.activation(node)
        if weight is None or weight.dequantize is None or activation is None:
            continue
        types = [view.type(one.inputs[1]) for one in (activation, weight.dequantize)]
        if None not in types and types[0] != types[1]:
            got = " and ".join(one.name for one in types if one is not None)
            yield str(node.name), f"both scales must have one type, got {got}", "convert one of them"


def quantise_inputs(view: View) -> Iterator[Problem]:
    for node in view.nodes("QuantizeLinear"):
        value = node.inputs[0]
        dtype = view.type(value)
        if dtype is not None and dtype not in FLOATS:
            yield str(node.name), f"QuantizeLinear must read a float, got {dtype.name}", "add a Cast before it"
        shape = view.shape(value) if value.is_initializer() else value.shape
        if shape is not None and len(shape) == 0:
            yield str(node.name), "QuantizeLinear must not read a scalar", "give it one dimension"


def _blocked(view: View) -> Iterator[tuple[ir.Node, tuple[int, ...], tuple[int, ...]]]:
    """(DequantizeLinear, data shape, scale shape) where the scale has the rank of its data."""
    for node in view.nodes("DequantizeLinear"):
        data, scale = view.shape(node.inputs[0]), view.shape(node.inputs[1])
        if data is not None and scale is not None and len(scale) == len(data) > 1:
            yield node, data, scale


def block_axes(view: View) -> Iterator[Problem]:
    for node, data, scale in _blocked(view):
        blocked = [axis for axis, (n, m) in enumerate(zip(data, scale, strict=True)) if n != m]
        if any(axis < len(data) - 2 for axis in blocked):
            got = f"axis {blocked[0]} of {len(data)}"
            yield (
                str(node.name),
                f"blocks must lie along one of the last two axes, got {got}",
                "reshape to 2-D, then back",
            )
        elif len(blocked) > 1:
            yield str(node.name), f"only one axis may be in blocks, got {len(blocked)}", "use blocks along K only"


def block_lengths(view: View) -> Iterator[Problem]:
    for node, data, scale in _blocked(view):
        if any(n % m for n, m in zip(data, scale, strict=True)):
            yield (
                str(node.name),
                f"blocks must divide the weight evenly, got {scale} scales for {data}",
                "use another block",
            )
        elif data != scale and "block_size" not in node.attributes:
            yield str(node.name), "block_size must be written (ONNX checks it)", "set block_size"


def int8_blocks(view: View) -> Iterator[Problem]:
    for node, data, scale in _blocked(view):
        if view.type(node.inputs[0]) == D.INT8 and data != scale:
            yield str(node.name), "TensorRT has no int8 in blocks (TensorRT for RTX has)", "use one scale per channel"


def int4_under_int8(view: View) -> Iterator[Problem]:
    """Only a MatMul takes int4 under int8 activations as it is, and only with one scale per channel."""
    for node in view.nodes("Conv", "MatMul", "Gemm"):
        weight, activation = view.weight(node), view.activation(node)
        if weight is None or weight.dequantize is None or weight.is_requantised or activation is None:
            continue
        if view.type(weight.value) != D.INT4:
            continue
        rank = len(view.shape(weight.dequantize.inputs[1]) or ())
        if node.op_type == "Conv" or rank != 1:
            of = (
                "convolution weights"
                if node.op_type == "Conv"
                else "weights in blocks"
                if rank
                else "weights of one scale"
            )
            fix = "requantise them: DequantizeLinear by 2, QuantizeLinear by 1 to int8, DequantizeLinear by half the scale"
            yield str(node.name), f"int4 {of} cannot stand under int8 activations", fix


def cancelled_pairs(view: View) -> Iterator[Problem]:
    """'Mismatched type, i8 vs. expected type: int4': Dequantize and Quantize of one scale are taken out together."""
    for node in view.nodes("QuantizeLinear"):
        before = view.producer(node.inputs[0], "DequantizeLinear")
        if before is None or view.type(before.inputs[0]) != D.INT4:
            continue
        scales = [view.constant(one.inputs[1]) for one in (before, node)]
        if scales[0] is not None and scales[1] is not None and np.array_equal(scales[0], scales[1]):
            yield (
                str(node.name),
                "int4 is requantised with the scale it has: the pair cancels out",
                "use twice the scale",
            )


def quantised_uses(view: View) -> Iterator[Problem]:
    """'Quantized constant is only allowed before DQ'; no arithmetic on quantised types."""
    for name, value in view.graph.initializers.items():
        if view.type(value) not in QUANTISED:
            continue
        for use in value.uses():
            if use.node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
                got = f"{use.node.op_type} {use.node.name}"
                yield (
                    name,
                    f"an {view.types[value].name} constant may only enter DequantizeLinear, got {got}",
                    "dequantise it",
                )
    allowed = {"DequantizeLinear", "Cast"} | MOVES
    for node in view.graph:
        wrong = [
            v for v in node.outputs if view.type(v) in QUANTISED for u in v.uses() if u.node.op_type not in allowed
        ]
        if wrong:
            user = next(u.node.op_type for u in wrong[0].uses() if u.node.op_type not in allowed)
            yield str(node.name), f"{user} computes on {view.types[wrong[0]].name} integers", "dequantise first"


def odd_counts(view: View) -> Iterator[Problem]:
    for name, value in view.graph.initializers.items():
        shape = view.shape(value)
        if view.type(value) in (D.INT4, D.UINT4, D.FLOAT4E2M1) and shape is not None and int(np.prod(shape)) % 2:
            yield (
                name,
                f"a four-bit tensor must have an even number of values, got {int(np.prod(shape))}",
                "store it in int8",
            )
