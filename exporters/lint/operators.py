"""Rules about operators and plain types: what the parsers do not know, or know only in one form."""

from collections.abc import Iterator, Sequence

import numpy as np

from .view import FLOATS, FP8, D, View

Problem = tuple[str, str, str]

_NO_PARSER = {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "BitShift"}
_NO_PARSER |= {"BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot", "SequenceAt", "SequenceEmpty", "SequenceLength"}
_NO_PARSER |= {"SplitToSequence", "SequenceConstruct", "SequenceInsert", "ConcatFromSequence", "StringNormalizer"}
_SAME_TYPE = {"Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "MatMul", "Gemm", "Conv", "Concat", "Equal", "Less"}
_SAME_TYPE |= {"Greater", "PRelu", "Sum", "Mean", "LayerNormalization", "GroupNormalization", "InstanceNormalization"}
# Operator -> the first opset whose form the parsers take, or the last one before a form that fails.
_LARGEST_OPSET = 25
_RESIZE = {"nearest", "linear"}
_COORDINATES = {"half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners", "tf_half_pixel_for_nn"}
# Data type -> the oldest architecture that has it (TensorRT for RTX names the type and refuses the whole list).
_SINCE = {D.BFLOAT16: 80, D.INT4: 80, D.FLOAT4E2M1: 100} | dict.fromkeys(FP8, 89)


def unsupported(view: View) -> Iterator[Problem]:
    for node in view.graph:
        if node.op_type in _NO_PARSER:
            fix = (
                "use QuantizeLinear and DequantizeLinear"
                if "Q" in node.op_type or "Integer" in node.op_type
                else "rewrite it"
            )
            yield str(node.name), f"operator {node.op_type} is not supported by the parser", fix
        elif node.domain not in ("", "ai.onnx"):
            yield (
                str(node.name),
                f"operator {node.domain}.{node.op_type} needs a plugin",
                "use operators of ONNX itself",
            )


def opsets(view: View) -> Iterator[Problem]:
    """float16 scales need 19, four-bit types 21; from 23 on Attention fails the build where it cannot be fused."""
    types = set(view.types.values())
    scales = {view.type(node.inputs[1]) for node in view.nodes("QuantizeLinear", "DequantizeLinear")}
    attention = next(iter(view.nodes("Attention")), None)
    if view.opset < 19 and D.FLOAT16 in scales:
        yield "graph", f"float16 scales need opset 19, got {view.opset}", "write opset 21"
    if view.opset < 21 and types & {D.INT4, D.UINT4}:
        yield "graph", f"four-bit types need opset 21, got {view.opset}", "write opset 21"
    if view.opset < 22 and any(view.type(n.inputs[0]) == D.BFLOAT16 for n in view.nodes("Conv")):
        yield "graph", f"bfloat16 convolutions need opset 22, got {view.opset}", "use float16"
    if attention is not None:
        yield str(attention.name), "an Attention node that cannot be fused fails the build", "write opset 21"
    if view.opset > _LARGEST_OPSET:
        yield "graph", f"opset must be at most {_LARGEST_OPSET}, got {view.opset}", "write opset 21"


def mixed_types(view: View) -> Iterator[Problem]:
    """Networks are strongly typed: nothing is converted silently."""
    for node in view.graph:
        types = [view.type(value) for value in node.inputs if value is not None]
        found = sorted({one.name for one in types if one in FLOATS})
        if node.op_type in _SAME_TYPE and len(found) > 1:
            yield (
                str(node.name),
                f"{node.op_type} must have inputs of one type, got {' and '.join(found)}",
                "add a Cast",
            )


def layer_norm_outputs(view: View) -> Iterator[Problem]:
    for node in view.nodes("LayerNormalization"):
        if any(value.uses() for value in node.outputs[1:]):
            yield (
                str(node.name),
                "only the first output of LayerNormalization is supported",
                "compute mean and variance apart",
            )


def resize_modes(view: View) -> Iterator[Problem]:
    for node in view.nodes("Resize"):
        mode = _text(node, "mode", "nearest")
        where = _text(node, "coordinate_transformation_mode", "half_pixel")
        smooth = node.attributes["antialias"].as_int() if "antialias" in node.attributes else 0
        if mode not in _RESIZE or where not in _COORDINATES or smooth:
            got = f"{mode}, {where}" + (", antialias" if smooth else "")
            yield (
                str(node.name),
                f"Resize must be nearest or linear without antialias, got {got}",
                "use nearest, asymmetric",
            )


def uint4(view: View) -> Iterator[Problem]:
    for name, value in view.graph.initializers.items():
        if view.type(value) == D.UINT4:
            yield name, "a UINT4 constant cannot be imported", "store INT4, zero point 0"


def fp8_formats(view: View) -> Iterator[Problem]:
    for name, value in view.graph.initializers.items():
        if view.type(value) in FP8 - {D.FLOAT8E4M3FN}:
            yield name, f"8-bit floats must be E4M3FN, got {view.types[value]}", "convert it to FLOAT8E4M3FN"


def overflows(view: View) -> Iterator[Problem]:
    for name, value in view.graph.initializers.items():
        if view.type(value) == D.FLOAT16 and "." not in name:
            array = view.constant(value)
            if array is not None and not np.isfinite(array).all():
                yield name, "a float16 constant must be finite, got Inf or NaN", "use a value below 65504"


def hardware_types(view: View, architectures: Sequence[str]) -> Iterator[Problem]:
    """One engine for several architectures must do with the types of the oldest."""
    for dtype in sorted(set(view.types.values()) & set(_SINCE), key=str):
        old = [one for one in architectures if int(one.removeprefix("sm")) < _SINCE[dtype]]
        if old:
            name = next(str(value.name) for value, found in view.types.items() if found == dtype)
            yield name, f"{dtype.name} needs sm{_SINCE[dtype]}, got {', '.join(old)} in the list", "build those apart"


def _text(node: object, name: str, default: str) -> str:
    found = node.attributes.get(name)  # type: ignore[attr-defined]
    return str(found.as_string()) if found is not None else default
