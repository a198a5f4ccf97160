"""Prepend the row encoder to the UNet again: one graph that takes text embeddings in every step, like other pipelines."""

import numpy as np
import onnx_ir as ir

from .nodes import Builder


def inline_rows(model: ir.Model, rows: ir.Model) -> None:
    """Compute the UNet's input `rows` from `encoder_hidden_states` (B,77,C) with the row encoder's nodes. Edits both."""
    graph, source = model.graph, rows.graph
    text, packed = source.inputs[0], source.outputs[0]
    nodes = list(source)
    source.inputs.clear()
    source.outputs.clear()
    source.remove(nodes)
    for name in list(source.initializers):
        value = source.initializers.pop(name)
        value.name = name if "." in name else f"rows_{name}"  # names with a dot are the checkpoint's
        graph.register_initializer(value)
    for index, node in enumerate(nodes):
        node.name = f"rows_{index}"
        for number, value in enumerate(node.outputs):
            value.name = f"rows_{index}_{number}"
    graph.extend(nodes)
    text.name = "encoder_hidden_states"
    old = next(value for value in graph.inputs if value.name == "rows")
    graph.inputs[list(graph.inputs).index(old)] = text
    ir.convenience.replace_all_uses_with(old, packed)
    graph.sort()


def scalar_timestep(model: ir.Model) -> None:
    """Take `timestep` () instead of (1,): what diffusers' pipelines pass."""
    graph = model.graph
    old = next(value for value in graph.inputs if value.name == "timestep")
    old.name = "timestep_1"
    scalar = ir.Value(name="timestep", type=old.type, shape=ir.Shape(()))
    build = Builder(graph, "timestep_shape")
    ir.convenience.replace_all_uses_with(old, build("Reshape", scalar, build.constant(np.array([1], np.int64))))
    graph.inputs[list(graph.inputs).index(old)] = scalar
    graph.sort()
