"""Look inside the UNet: samples of every layer's and block's output, and the attention of each text row, beside the goldens.

The graph gets more outputs: a Reshape and a Gather for each sampled value, so that a tap costs a few
numbers, not a tensor. Its integer kernels stay: taps sit behind each layer's own Quantize and Dequantize.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from personalq.errors import BundleError
from personalq.goldens import BLOCK_SAMPLES, LAYER_SAMPLES, sample_positions
from personalq.rows import RowLayer

from ..engines.onnxfile import Edited, Graph, Node
from ..engines.sessions import Session, open_session
from .levels.obedience import LayerInGraph
from .subject import Subject

Float = npt.NDArray[np.float32]
LAST_LAYERS = (
    "conv2",
    "proj_out",
)  # of a ResNet block, of a transformer block: an Add follows, then the block's output
PASSES_ON = (
    *("QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Mul", "Div", "Add"),
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze"),
)


@dataclass(frozen=True)
class Seen:
    """N golden inputs: layers, blocks {name: (N, samples)}, attention (N,L,77), noise_pred (N,4,h,w).

    branches: of the layers that an adapter changes, what its branch adds to the layer, at the layer's samples.
    """

    layers: dict[str, Float]
    blocks: dict[str, Float]
    attention: Float
    noise_pred: Float
    branches: dict[str, Float]


@dataclass(frozen=True)
class Taps:
    """What to tap: name -> value, in the order the graph computes them; cross-attention softmax by row layer.

    channels_last: layers whose value is (B,h,w,C), as an adapter's branch leaves it; goldens are (B,C,h,w). branches: what an
    adapter adds to a layer, in the same order; biased: those in which the layer's bias is a row of the branch.
    """

    layers: dict[str, str]
    blocks: dict[str, str]
    attention: list[str]
    channels_last: frozenset[str] = frozenset()
    branches: Mapping[str, str] = field(default_factory=dict)
    biased: frozenset[str] = frozenset()


def golden_sizes(subject: Subject, kind: str) -> dict[str, int]:
    """'layers' or 'blocks' of the goldens: name -> values of one whole output."""
    return {str(name): int(size) for name, size in json.loads(subject.notes[kind]).items()}


def find_taps(
    graph: Graph, layers: list[str], blocks: list[str], rows: tuple[RowLayer, ...], changed: Collection[str] = ()
) -> Taps:
    """Find the value of each layer, block and attention. Raises BundleError naming one that the graph does not show.

    changed: layers whose branch is looked for as well.
    """
    order = {output: i for i, node in enumerate(graph.nodes) for output in node.outputs}
    of_layers = {name: layer_output(graph, name) for name in layers}
    of_blocks = {name: _block_output(graph, name, of_layers) for name in blocks}
    ordered = [dict(sorted(found.items(), key=lambda item: order.get(item[1], 0))) for found in (of_layers, of_blocks)]
    turned = frozenset(name for name, value in of_layers.items() if _is_turned(graph, value))
    added = {name: _branch(graph, name, of_layers[name]) for name in changed if name in of_layers}
    branches = {name: value for name, value in added.items() if value}
    biased = frozenset(name for name in branches if not _is_branch(graph.producers[of_layers[name]], name))
    return Taps(ordered[0], ordered[1], [_softmax(graph, row) for row in rows], turned, branches, biased)


def layer_output(graph: Graph, name: str) -> str:
    """The value that a layer outputs: after its bias, and after its output's Quantize and Dequantize."""
    found = LayerInGraph(graph, name)
    if found.node is None:
        raise BundleError(f"{name}: must be a layer of the graph, got none that reads its weight; export again")
    value = found.node.outputs[0]
    for added in (_low_rank(graph, name), f"{name}.bias"):
        adds = [reader for reader in graph.readers.get(value, []) if reader.op == "Add" and added in reader.inputs]
        value = adds[0].outputs[0] if adds else value
    if found.output_q is not None:
        (dequantised, *_) = graph.readers[found.output_q.outputs[0]]
        value = dequantised.outputs[0]
    return _with_branch(graph, name, value)


def _with_branch(graph: Graph, name: str, value: str) -> str:
    """The sum of a layer's output and its adapter's branch, where it has one: behind a Transpose to channels last or not.

    The sum is a node of the branch, or the one that adds the bias, which is a row of the branch's product then.
    """
    readers = graph.readers.get(value, [])
    turned = [node.outputs[0] for node in readers if node.op == "Transpose"]
    for one in (value, *turned):
        for node in graph.readers.get(one, []):
            made = (graph.producers.get(source) for source in node.inputs if source != one)
            is_of_branch = any(other is not None and _is_branch(other, name) for other in (node, *made))
            if node.op == "Add" and is_of_branch:
                return node.outputs[0]
    return value


def _is_branch(node: Node, name: str) -> bool:
    return node.name.startswith(f"{name}.branch_")


def _branch(graph: Graph, name: str, value: str) -> str:
    """What an adapter adds where `value` is the sum of a layer and its branch (a bias in it or not); '' where it is none."""
    node = graph.producers.get(value)
    if node is None or node.op != "Add":
        return ""
    if _is_branch(node, name):
        return node.inputs[1]
    made = ((source, graph.producers.get(source)) for source in node.inputs)
    return next((source for source, one in made if one is not None and _is_branch(one, name)), "")


def _is_turned(graph: Graph, value: str) -> bool:
    """Whether a layer's value is a sum that is made with channels last."""
    node = graph.producers.get(value)
    if node is None or ".branch_" not in node.name:
        return False
    made = (graph.producers.get(source) for source in node.inputs)
    return any(one is not None and one.op == "Transpose" and ".branch_" not in one.name for one in made)


def _low_rank(graph: Graph, name: str) -> str:
    """The product that a layer's low-rank branch adds to it, '' when it has none."""
    readers = graph.readers.get(f"{name}.low_rank_up", [])
    if readers and readers[0].op == "Cast":
        readers = graph.readers.get(readers[0].outputs[0], [])
    return readers[0].outputs[0] if readers else ""


def _block_output(graph: Graph, name: str, layers: dict[str, str]) -> str:
    last = next((f"{name}.{end}" for end in LAST_LAYERS if f"{name}.{end}" in layers), None)
    if last is None:
        raise BundleError(f"{name}: must end in {' or '.join(LAST_LAYERS)}, got neither; calibrate again")
    node = _next(graph, layers[last], ("Add",))
    if node is None:
        raise BundleError(f"{name}: must end in an Add after {last}, got none; export again")
    return node.outputs[0]


def _next(graph: Graph, value: str, wanted: tuple[str, ...], most: int = 12) -> Node | None:
    """The first node of a wanted kind that `value` reaches through nodes that only pass it on."""
    queue = [(value, 0)]
    while queue:
        current, depth = queue.pop(0)
        for node in graph.readers.get(current, []):
            if node.op in wanted:
                return node
            if node.op in PASSES_ON and depth < most:
                queue += [(output, depth + 1) for output in node.outputs]
    return None


def _softmax(graph: Graph, row: RowLayer) -> str:
    """The softmax of the layer whose K starts at row.offset: where the slice of the rows at that offset leads."""
    for node in graph.nodes:
        if node.op != "Slice" or len(node.inputs) < 3 or _int(graph, node.inputs[1]) != row.offset:
            continue
        if _int(graph, node.inputs[2]) != row.offset + row.width or not _from_rows(graph, node):
            continue
        product = _next(graph, node.outputs[0], ("MatMul",))
        softmax = _next(graph, product.outputs[0], ("Softmax",)) if product is not None else None
        if softmax is not None:
            return softmax.outputs[0]
    raise BundleError(f"{row.name}: must have a softmax over its text rows in the graph, got none; export again")


def _from_rows(graph: Graph, node: Node) -> bool:
    source = graph.producers.get(node.inputs[0])
    return node.inputs[0] == "rows" or (source is not None and source.op == "GatherND")


def _int(graph: Graph, value: str) -> int | None:
    constant = graph.constant(value)
    return None if constant is None or constant.size != 1 else int(constant.reshape(-1)[0])


def tapped(graph: Graph, taps: Taps, sizes: dict[str, int]) -> bytes:
    """The model with a small output for every tap. sizes: values of each layer's and block's whole output."""
    edited = Edited(graph)
    edited.add_constant("gate_flat", np.array([-1], np.int64))
    edited.add_constant("gate_axes", np.array([0, 1, 2], np.int64))
    groups = (
        (taps.layers, LAYER_SAMPLES, "layer"),
        (taps.branches, LAYER_SAMPLES, "branch"),
        (taps.blocks, BLOCK_SAMPLES, "block"),
    )
    for group, count, kind in groups:
        for name, value in group.items():
            key = f"gate_{kind}_{name}"
            edited.add_constant(f"{key}_at", sample_positions(name, sizes[name], count))
            if kind == "branch" and name in taps.biased:
                edited.add_node("Sub", [value, f"{name}.bias"], f"{key}_alone")
                value = f"{key}_alone"
            if kind != "block" and name in taps.channels_last:
                edited.add_node("Transpose", [value], f"{key}_turned", perm=[0, 3, 1, 2])
                value = f"{key}_turned"
            edited.add_node("Reshape", [value, "gate_flat"], f"{key}_flat")
            edited.add_node("Gather", [f"{key}_flat", f"{key}_at"], key)
            edited.add_output(key)
    for i, value in enumerate(taps.attention):
        edited.add_node("ReduceMean", [value, "gate_axes"], f"gate_attention_{i}", keepdims=0)
        edited.add_output(f"gate_attention_{i}")
    return edited.serialized()


def look(subject: Subject) -> Seen:
    """Run the golden inputs through the tapped UNet."""
    sizes = {kind: golden_sizes(subject, kind) for kind in ("layers", "blocks")}
    layers, blocks = (list(sizes[kind]) for kind in ("layers", "blocks"))
    changed = subject.attached.pairs.get("unet", {})
    taps = find_taps(subject.unet, layers, blocks, subject.manifest.rows.layers, changed)
    model = tapped(subject.unet, taps, sizes["layers"] | sizes["blocks"])
    session = open_session(subject.unet_path, subject.threads, model=model)
    runs = list(_runs(subject, session))
    groups = {"layer": taps.layers, "block": taps.blocks, "branch": taps.branches}
    of_layers, of_blocks, of_branches = (
        {name: np.stack([run[f"gate_{kind}_{name}"] for run in runs]) for name in group}
        for kind, group in groups.items()
    )
    attention = [np.stack([run[f"gate_attention_{i}"] for i in range(len(taps.attention))]) for run in runs]
    return Seen(
        of_layers, of_blocks, np.stack(attention), np.stack([run["noise_pred"][0] for run in runs]), of_branches
    )


def _runs(subject: Subject, session: Session) -> Iterator[dict[str, Float]]:
    names = [value.name for value in session.get_outputs()]
    for n in range(len(subject.golden["sample"])):
        yield dict(zip(names, session.run(names, subject.feed(n)), strict=True))
