"""Fuse self-attention into one operator; scores stay in the cache: com.microsoft.MultiHeadAttention (ONNX Runtime, OpenVINO)."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

DOMAIN = "com.microsoft"


def fuse_attention(model: ir.Model) -> int:
    """Replace softmax(scale Q . K^T) . V between its Reshapes by one node; return how many were found. Edits `model`.

    Attention over text rows stays unfused: it is short (77 rows), and the gate reads its softmax.
    Requires the form that exporters.graphs.trace writes. Same arithmetic in another order (float32, equal to about 1e-6).
    """
    graph, found = model.graph, 0
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        found += _fuse(graph, softmax)
    if found:
        model.graph.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)
        graph.sort()
    return found


def _fuse(graph: ir.Graph, softmax: ir.Node) -> bool:
    scores, product = _made_by(softmax.inputs[0], "MatMul"), _only_reader(softmax.outputs[0], "MatMul")
    turned = _only_reader(product.outputs[0], "Transpose") if product else None
    flat = _only_reader(turned.outputs[0], "Reshape") if turned else None
    scaled = _made_by(scores.inputs[0], "Mul") if scores else None
    if scores is None or product is None or flat is None or scaled is None:
        return False
    scale = scaled.inputs[1].const_value
    parts = [_before_split(value) for value in (scaled.inputs[0], scores.inputs[1], product.inputs[1])]
    if scale is None or any(part is None for part in parts) or _made_by(parts[1][0], "Slice"):
        return False
    heads = parts[0][1]
    attributes = {"num_heads": heads, "scale": float(scale.numpy().reshape(()))}
    node = ir.node(
        "MultiHeadAttention",
        [value for value, _ in parts],
        attributes=attributes,
        domain=DOMAIN,
        name=f"{softmax.name}_mha",
    )
    made, old = node.outputs[0], flat.outputs[0]
    made.name, made.type, made.shape = f"{softmax.name}_mha_out", old.type, old.shape
    graph.append(node)
    ir.convenience.replace_all_uses_with(old, made)
    return True


def _before_split(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """(B,heads,..) <- Transpose <- Reshape <- (B,N,C): the last of these, and the number of heads."""
    transpose = _made_by(value, "Transpose")
    reshape = _made_by(transpose.inputs[0], "Reshape") if transpose else None
    if reshape is None or reshape.outputs[0].shape is None:
        return None
    heads = reshape.outputs[0].shape[2]
    return (reshape.inputs[0], heads) if isinstance(heads, int) else None


def _made_by(value: ir.Value | None, op: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op else None


def _only_reader(value: ir.Value, op: str) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op else None
