"""Write a second lowering of one UNet over the data file of the first: what has the same bytes is stored once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from .external_data import Array, StoredTensor, forget_shapes


def write_sharing_graph(
    model: ir.Model, tensors: list[StoredTensor], read: Callable[[str], Array], path: Path, first: ir.Model
) -> None:
    """Write `path`; tensors that `first` (already written, in the same folder) stores become references to its offsets.

    Same name, type and shape means the same bytes within one export. The others, vectors in another float type and less
    than a thousandth of a real UNet, are stored in the graph file itself: a builder can refit them by name like the rest.
    """
    for tensor in tensors:
        value = model.graph.initializers[tensor.name]
        stored = first.graph.initializers.get(tensor.name)
        known = stored.const_value if stored is not None else None
        shape = ir.Shape(tensor.shape)
        if isinstance(known, ir.ExternalTensor) and (known.dtype, known.shape) == (tensor.dtype, shape):
            value.const_value = known
        else:
            array = np.ascontiguousarray(tensor.make(read))
            value.const_value = ir.tensor(array, name=tensor.name)
        value.type, value.shape = ir.TensorType(tensor.dtype), shape
    forget_shapes(model)
    ir.save(model, path)
