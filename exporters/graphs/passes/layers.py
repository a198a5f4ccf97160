"""Find the node that computes each Conv2d / Linear of the spec, and give every Linear one shape: MatMul, then Add."""

from dataclasses import dataclass

import onnx_ir as ir

from personalq.errors import SpecError
from personalq.spec import Spec

from .nodes import Builder


@dataclass(frozen=True)
class LayerNode:
    """One layer in the graph: the Conv or MatMul, and the initializer that holds its weight."""

    name: str
    op: str  # conv | linear
    node: ir.Node
    weight: ir.Value


def split_gemms(model: ir.Model) -> None:
    """Gemm(x, W[N,K], b, transB=1) -> Add(MatMul(x, Transpose(W)), b): ORT has no integer Gemm with a float bias."""
    graph = model.graph
    for node in [n for n in graph if n.op_type == "Gemm" and n.inputs[1].is_initializer()]:
        build = Builder(graph, f"{node.inputs[1].name}.split")
        weight = build("Transpose", node.inputs[1], perm=[1, 0])
        product = build("MatMul", node.inputs[0], weight)
        result = build("Add", product, node.inputs[2]) if len(node.inputs) > 2 else product
        weight.dtype, product.dtype = node.inputs[1].dtype, node.outputs[0].dtype
        replace_output(node, result)
    graph.sort()


def replace_output(node: ir.Node, value: ir.Value) -> None:
    """Let every reader of node's output read `value`; remove the node. Graph outputs keep their name."""
    old = node.outputs[0]
    value.shape, value.dtype = value.shape or old.shape, value.dtype or old.dtype
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


def find_layers(model: ir.Model) -> dict[str, LayerNode]:
    """layer name -> its node, for every Conv and MatMul whose weight is a checkpoint tensor `<layer>.weight`."""
    found = {}
    for node in model.graph:
        if node.op_type not in ("Conv", "MatMul"):
            continue
        weight = node.inputs[1]
        producer = weight.producer()
        if producer is not None and producer.op_type == "Transpose":
            weight = producer.inputs[0]
        if weight.is_initializer() and (weight.name or "").endswith(".weight"):
            name = str(weight.name).removesuffix(".weight")
            found[name] = LayerNode(name, "conv" if node.op_type == "Conv" else "linear", node, weight)
    return found


def layers_of(model: ir.Model, spec: Spec) -> dict[str, LayerNode]:
    """`find_layers`, held against the spec. Raises SpecError when the two do not name the same layers."""
    layers = find_layers(model)
    if set(layers) != set(spec.layers):
        odd = sorted(set(layers) ^ set(spec.layers))
        raise SpecError(
            f"spec {spec.name}: layers must be those of the family, got a difference at {odd[0]}; calibrate again"
        )
    return layers
