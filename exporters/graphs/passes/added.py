"""What an adapter adds beside branches, as graph inputs: vectors of learned tokens, and rows of the text's K and V."""

import numpy as np
import onnx_ir as ir

from personalq.bundle import ADDED_ROWS, ADDED_VECTORS, BranchPlace
from personalq.weights.models import TOKEN_EMBEDDING

from .branches import Branches, add_branches
from .layers import find_layers, split_gemms
from .nodes import Builder, add_input


def open_encoder(model: ir.Model, first_added_id: int) -> dict[str, BranchPlace]:
    """Give a text encoder a branch for every Linear, and `added_vectors`; return where the branches are. Edits `model`.

    Call it before its floats are stored. Ensures: the outputs keep their names.
    """
    outputs = [value.name for value in model.graph.outputs]
    split_gemms(model)
    for value, name in zip(model.graph.outputs, outputs, strict=True):
        value.name = name
    layers, branches = find_layers(model), Branches(is_wide=True)
    places = {name: place.model_copy(update={"is_wide": False}) for name, place in branches.places(layers).items()}
    add_branches(model, layers, places, branches)
    add_vectors(model, first_added_id)
    return places


def add_vectors(model: ir.Model, first_added_id: int) -> None:
    """Take row id - first_added_id of the input `added_vectors` (n,C), n >= 1, for ids from there on. Edits `model`.

    Two look-ups and a choice: the table, which is large, is not copied.
    """
    graph = model.graph
    node = next(node for node in graph if node.op_type == "Gather" and _is_table(node.inputs[0]))
    table, ids = node.inputs
    assert table is not None and ids is not None and table.shape is not None
    vectors = add_input(graph, ADDED_VECTORS, ir.DataType.FLOAT, ("added", table.shape[1]))
    build = Builder(graph, ADDED_VECTORS)
    first, last = (build.constant(np.array(value, np.int64)) for value in (first_added_id, first_added_id - 1))
    is_added = build("Unsqueeze", build("GreaterOrEqual", ids, first), build.constant(np.array([-1], np.int64)))
    place = build("Max", build("Sub", ids, first), build.constant(np.array(0, np.int64)))
    readers = [(use.node, use.idx) for use in node.outputs[0].uses()]
    node.replace_input_with(1, build("Min", ids, last))
    chosen = build("Where", is_added, build("Gather", vectors, place, axis=0), node.outputs[0])
    for reader, index in readers:
        reader.replace_input_with(index, chosen)
    graph.sort()


def add_rows(model: ir.Model) -> None:
    """Add the input `added_rows` (b,t,R), b 1 or the batch and t 1 or the tokens, to the row encoder's `rows`. Edits `model`.

    Call it before `emit_storage_form`: rest and kept rows are made of the sum.
    """
    graph = model.graph
    old = graph.outputs[0]
    assert old.shape is not None and old.dtype is not None
    added = add_input(graph, ADDED_ROWS, old.dtype, ("added_batch", "added_tokens", old.shape[2]))
    total = Builder(graph, ADDED_ROWS)("Add", old, added)
    total.name, old.name = old.name, f"{old.name}_plain"
    total.type, total.shape = old.type, old.shape
    graph.outputs[0] = total


def _is_table(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and (value.name or "").endswith(TOKEN_EMBEDDING)
