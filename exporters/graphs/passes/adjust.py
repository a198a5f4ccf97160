"""What a spec may add around the integers: a balanced input, a parallel low-rank branch, a corrected prediction."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...external_data import StoredTensor
from .layers import LayerNode
from .nodes import Builder, add_initializer

Array = npt.NDArray[np.generic]


def balance(build: Builder, layer: LayerNode, vector: Array, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """The layer's input divided by `vector` (C_in,): channels last for a Linear, NCHW for a Conv. dtype: the graph's."""
    shape = (1, -1, 1, 1) if layer.op == "conv" else (-1,)
    inverse = (1 / np.asarray(vector, np.float32)).reshape(shape).astype(dtype.numpy())
    return build("Mul", layer.node.inputs[0], build.constant(inverse))


def add_low_rank(
    build: Builder, layer: LayerNode, down: Array, up: Array, dtype: ir.DataType = ir.DataType.FLOAT
) -> list[StoredTensor]:
    """y -> y + (x @ down) @ up for a Linear's MatMul; x as it was before any quantiser. Returns what to store, FP16.

    down: (K, r), up: (r, N). dtype: the graph's float type. Call it before the input is replaced.
    """
    stored, x = [], layer.node.inputs[0]
    for part, matrix in (("low_rank_down", down), ("low_rank_up", up)):
        name, half = f"{layer.name}.{part}", np.asarray(matrix, np.float16)
        value = add_initializer(build.graph, name, ir.tensor(half, name=name))
        x = build("MatMul", x, value if dtype == ir.DataType.FLOAT16 else build("Cast", value, to=dtype))
        stored.append(StoredTensor(name, "", ir.DataType.FLOAT16, half.shape, given=half))
    old = layer.node.outputs[0]
    readers = [(use.node, use.idx) for use in old.uses()]
    total = build("Add", old, x)
    for reader, index in readers:
        reader.replace_input_with(index, total)
    return stored


def correct_prediction(model: ir.Model, gain: Array, mean: Array, train_steps: int = 1000) -> None:
    """noise_pred -> (noise_pred - mean[bin]) / (1 + gain[bin]); bin: which of len(gain) equal parts `timestep` is in.

    gain: (bins,), mean: (bins, 4) float32. PTQD (He et al., NeurIPS'23, arXiv 2305.10657): the part of the
    quantisation noise that follows the prediction is divided out, the mean of the rest subtracted.
    """
    graph, build = model.graph, Builder(model.graph, "correction")
    old = graph.outputs[0]
    timestep = next(value for value in graph.inputs if value.name == "timestep")
    part = build("Mul", timestep, build.constant(np.array(len(gain) / train_steps, np.float32)))
    index = build("Min", build("Cast", part, to=ir.DataType.INT64), build.constant(np.array(len(gain) - 1, np.int64)))
    shift = build("Gather", build.constant(np.asarray(mean, np.float32)[:, :, None, None]), index, axis=0)
    factor = (1 / (1 + np.asarray(gain, np.float32))).reshape(-1, 1, 1, 1)
    result = build("Mul", build("Sub", old, shift), build("Gather", build.constant(factor), index, axis=0))
    result.name, old.name = old.name, f"{old.name}_uncorrected"
    result.type, result.shape = old.type, old.shape
    graph.outputs[0] = result
    graph.sort()
