"""A graph of one quantised layer, as the `ort` lowering writes it."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.runtime.conftest import GraphBuilder


def write_layer(
    file: Path, weight: np.ndarray, weight_scale: Any, scales: tuple[float, float], bias: Any = None, **attributes: Any
) -> Path:
    """A Conv (weight int8 O,C,kh,kw) or Linear (O,C) from x to y, both float32. scales: of x and y, stored as uint8 around 128.

    A Linear's output is not quantised. attributes: the Conv's.
    """
    graph, is_conv = GraphBuilder(), weight.ndim == 4
    zero = graph.constant(128, np.uint8)

    def quantised(value: str, scale: float, out: str = "") -> str:
        step = graph.constant(scale)
        return graph.op("DequantizeLinear", graph.op("QuantizeLinear", value, step, zero), step, zero, out=out)

    stored = graph.constant(weight if is_conv else np.ascontiguousarray(weight.T), np.int8)
    per_channel = graph.constant(np.broadcast_to(weight_scale, len(weight)))
    zeros = graph.constant(np.zeros(len(weight)), np.int8)
    floats = graph.op("DequantizeLinear", stored, per_channel, zeros, axis=0 if is_conv else 1)
    read = [quantised("x", scales[0]), floats, *([] if bias is None else [graph.constant(bias)])]
    if is_conv:
        channels = weight.shape[1] * attributes.get("group", 1)
        quantised(graph.op("Conv", *read, kernel_shape=weight.shape[2:], **attributes), scales[1], out="y")
        shape = [None, channels, None, None]
    else:
        graph.op("MatMul", *read, out="y")
        shape = [None, None, weight.shape[1]]
    graph.save(file, {"x": (np.float32, shape)}, {"y": (np.float32, [None] * len(shape))})
    return file
