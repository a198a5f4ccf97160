"""Text rows in the graphs: nodes in front of the UNet assemble rest and kept rows; the row encoder emits both forms.

Storage form (DESIGN: one engine serves every prompt and trigger position): `rest` int8 with one scale per token, layer
and K|V, `kept` float16 for at most S tokens, `row_index` telling each token which of the two it reads.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from personalq.numerics import QTYPES, SMALLEST_SCALE
from personalq.rows import RowLayer, packed_width

from .nodes import Builder, add_input


def assemble_rows(
    model: ir.Model, layers: Sequence[RowLayer], slots: int, dtype: ir.DataType = ir.DataType.FLOAT
) -> None:
    """Replace the UNet's input `rows` by Gather(Concat(rest * rest_scale, kept), row_index). Edits `model`.

    Requires: an input named rows (B,77,R). Ensures: inputs rest, rest_scale, kept, row_index instead of it; `dtype` is
    the float type the rows are put together in. float16 is for TensorRT, which lists no Cast from int8: there the same
    numbers come from a DequantizeLinear with scale 1 (its RTX builder makes one kernel of either).
    """
    graph = model.graph
    rows = next(value for value in graph.inputs if value.name == "rows")
    batch, tokens, width = rows.shape[0], rows.shape[1], packed_width(layers)
    rest = add_input(graph, "rest", ir.DataType.INT8, (batch, tokens, width))
    rest_scale = add_input(graph, "rest_scale", ir.DataType.FLOAT, (batch, tokens, 2 * len(layers)))
    kept = add_input(graph, "kept", ir.DataType.FLOAT16, (batch, slots, width))
    row_index = add_input(graph, "row_index", ir.DataType.INT64, (batch, tokens))
    build = Builder(graph, "rows")
    column = np.repeat(np.arange(2 * len(layers)), np.repeat([layer.width for layer in layers], 2))
    scale = rest_scale if dtype == rest_scale.dtype else build("Cast", rest_scale, to=dtype)
    scales = build("Gather", scale, build.constant(column.astype(np.int64)), axis=2)
    if dtype == ir.DataType.FLOAT16:
        whole = build("DequantizeLinear", rest, build.constant(np.array(1, np.float16)))
    else:
        whole = build("Cast", rest, to=dtype)
    restored = build("Mul", whole, scales)
    both = build("Concat", restored, kept if dtype == kept.dtype else build("Cast", kept, to=dtype), axis=1)
    index = build("Unsqueeze", row_index, build.constant(np.array([2], np.int64)))
    assembled = build("GatherND", both, index, batch_dims=1)
    ir.convenience.replace_all_uses_with(rows, assembled)
    graph.inputs.remove(rows)
    graph.sort()


def fix_row_count(model: ir.Model, count: int = 77) -> None:
    """Give the UNet's input `rows` (B,tokens,R) a number of rows, and fold what is computed from it. Edits `model`.

    For TensorRT, whose plans are static, and smaller so. Ensures: no value of the graph has an open row axis.
    """
    graph = model.graph
    rows = next(value for value in graph.inputs if value.name == "rows")
    symbol = rows.shape[1]
    build = Builder(graph, "tokens")
    size = build.constant(np.array([count], np.int64))
    for node in [use.node for use in rows.uses()]:
        if node.op_type == "Shape" and node.attributes["start"].as_int() == 1:
            for reader in _through_scalar(node):
                ir.convenience.replace_all_uses_with(reader.outputs[0], size)
    for value in [rows, *(value for node in graph for value in node.outputs)]:
        if value.shape is not None and symbol in value.shape:
            value.shape = ir.Shape([count if side == symbol else side for side in value.shape])
    RemoveUnusedNodesPass()(model)


def _through_scalar(node: ir.Node) -> Iterator[ir.Node]:
    """The Reshapes back to [1] of a size that torch.export made a scalar of; the node itself where there are none."""
    readers = [use.node for use in node.outputs[0].uses()]
    scalars = [one for one in readers if one.op_type == "Squeeze"]
    for scalar in scalars:
        yield from (use.node for use in scalar.outputs[0].uses() if use.node.op_type == "Reshape")
    if len(scalars) < len(readers):
        yield node


def emit_storage_form(model: ir.Model, layers: Sequence[RowLayer], slots: int) -> None:
    """Add outputs rest, rest_scale, kept (and input kept_index) to the row encoder. Edits `model`.

    Same arithmetic as personalq.numerics: scale = max(absmax / qmax, 2^-14), q = clip(round_half_even(x / scale)).
    """
    graph = model.graph
    rows = graph.outputs[0]
    batch, tokens, width = rows.shape[0], rows.shape[1], packed_width(layers)
    kept_index = add_input(graph, "kept_index", ir.DataType.INT64, (batch, slots))
    build = Builder(graph, "form")
    integers, scales = [], []
    axis, floor = build.constant(np.array([2], np.int64)), build.constant(np.array(SMALLEST_SCALE))
    for layer in layers:
        qtype = QTYPES[f"int{layer.rest_bits}"]
        qmax, low, high = (build.constant(np.array(v, np.float32)) for v in (qtype.qmax, qtype.qmin, qtype.qmax))
        for start in (layer.offset, layer.offset + layer.width):
            ends = (build.constant(np.array([v], np.int64)) for v in (start, start + layer.width))
            part = build("Slice", rows, *ends, axis)
            peak = build("ReduceMax", build("Abs", part), axis, keepdims=1)
            scale = build("Max", build("Div", peak, qmax), floor)
            steps = build("Clip", build("Round", build("Div", part, scale)), low, high)
            integers.append(build("Cast", steps, to=ir.DataType.INT8))
            scales.append(scale)
    index = build("Unsqueeze", kept_index, axis)
    rest = build("Concat", *integers, axis=2)
    rest_scale = build("Concat", *scales, axis=2)
    kept = build("Cast", build("GatherND", rows, index, batch_dims=1), to=ir.DataType.FLOAT16)
    kinds = [
        ("rest", rest, ir.DataType.INT8, (batch, tokens, width)),
        ("rest_scale", rest_scale, ir.DataType.FLOAT, (batch, tokens, 2 * len(layers))),
        ("kept", kept, ir.DataType.FLOAT16, (batch, slots, width)),
    ]
    for name, value, dtype, shape in kinds:
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
        graph.outputs.append(value)
