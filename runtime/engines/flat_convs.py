"""Rewrite a prepared graph's convolutions so that ONNX Runtime opens them in half the time. Same sums, same order.

Whenever it opens a graph, ONNX Runtime transposes a weight O,C,kh,kw to kh,kw,C,O, byte by byte, in one pass over the whole
tensor per kernel position: 60 % of the time that an SD1.5 UNet took to open. Over channels-last pixels the same
convolution has one channel: a pixel's C values become C columns, the kernel (kh, kw*C), a horizontal stride s*C. Its weight
O,1,kh,kw*C is transposed in one pass.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from personalq.repository.atomic import named_failure

from .onnxfile import INT8, INT64, UINT8, external_data, read_model

_FLAT = "flat_shape"  # the initializer that every added Reshape reads: N, H, W*C, 1
_WEIGHT = 3  # QLinearConv's input


def flatten_convs(graph: Path) -> int:
    """Rewrite an ONNX file and its external weights in place; how many convolutions were changed.

    It changes QLinearConv nodes over channels-last pixels, in one group, with a kernel larger than 1 x 1 and 8-bit weights
    of their own beside the file. Raises RepositoryError when a file cannot be written.
    """
    with named_failure(graph):
        model = read_model(graph)
        weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
        readers = Counter(name for node in model.graph.node for name in node.input)
        nodes, changed = model.graph.node, 0
        for place in reversed(range(len(nodes))):
            node = nodes[place]
            weight = weights.get(node.input[_WEIGHT]) if node.op_type == "QLinearConv" else None
            if weight is not None and readers[weight.name] == 1 and _can_be_flat(node, weight):
                _turn_over(graph.parent, weight)
                nodes.insert(place, _flatten(node, weight))
                changed += 1
        if changed:
            shape = np.array([0, 0, -1, 1], "<i8")  # 0: as it was
            model.graph.initializer.add(name=_FLAT, dims=shape.shape, data_type=INT64, raw_data=shape.tobytes())
            graph.write_bytes(model.SerializeToString())
    return changed


def _can_be_flat(node: Any, weight: Any) -> bool:
    told = {attribute.name: attribute for attribute in node.attribute}
    return (
        "channels_last" in told
        and told["channels_last"].i == 1
        and weight.data_type in (UINT8, INT8)
        and len(weight.dims) == 4
        and weight.dims[1] > 1
        and tuple(weight.dims[2:]) != (1, 1)
        and all(name in told for name in ("kernel_shape", "strides", "pads"))
        and ("group" not in told or told["group"].i == 1)
        and ("dilations" not in told or set(told["dilations"].ints) == {1})
        and ("auto_pad" not in told or told["auto_pad"].s == b"NOTSET")
    )


def _turn_over(folder: Path, weight: Any) -> None:
    """Transpose the weight's bytes O,C,kh,kw -> O,kh,kw,C in place."""
    where = external_data(weight)
    shape = tuple(weight.dims)
    stored = np.memmap(folder / where["location"], np.uint8, "r+", int(where.get("offset", 0)), shape)
    turned = np.ascontiguousarray(stored.transpose(0, 2, 3, 1))
    stored[:] = turned.reshape(shape)
    stored.flush()


def _flatten(node: Any, weight: Any) -> Any:
    """Make a convolution and its weight's shape flat; the Reshape that goes before it."""
    channels_out, channels, height, width = weight.dims
    weight.dims[:] = [channels_out, 1, height, width * channels]
    for attribute in node.attribute:
        if attribute.name == "kernel_shape":
            attribute.ints[:] = [height, width * channels]
        elif attribute.name in ("strides", "pads"):  # (down, across), or top, left, bottom, right
            attribute.ints[:] = [n * channels if place % 2 else n for place, n in enumerate(attribute.ints)]
    pixels, flat = node.input[0], f"{node.output[0]}_flat"
    node.input[0] = flat
    return type(node)(op_type="Reshape", name=flat, input=[pixels, _FLAT], output=[flat])
