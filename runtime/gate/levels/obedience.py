"""Level (b): is the graph what the spec decided? Census, scales, integers and kept rows, read from the files themselves."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import PersonalQError
from personalq.numerics import QTYPES, quantize
from personalq.spec import LayerSpec

from ...engines.engine import LOWERING, WIDE
from ...engines.onnxfile import Graph, Node, Tensor
from ..check import Check, equal, none_of
from ..subject import Subject

# Ops that round to integers. The row encoder spells its quantiser out: Round, Clip, Cast to INT8.
QUANTISERS = ("QuantizeLinear", "DynamicQuantizeLinear", "Round")
# A kept row is followed until it is multiplied by something else: the result is attention, no longer a row.
PRODUCTS = ("MatMul", "Softmax", "Gemm", "Attention", "MultiHeadAttention", "Shape", "Size")
COMPONENT_OF = {"unet": "unet", "text_rows": "unet", "vae_decoder": "vae"}
COMPONENT_OF |= {name: name for name in ("text_encoder", "text_encoder_2")}


def spec_in_graph(subject: Subject) -> Iterator[Check]:
    """Layers, widths, scales and zero points of the graph are the spec's, and so is the manifest's census."""
    spec = subject.spec_file.spec
    check, census = _layers_of(subject, subject.unet, "layers that differ from the spec")
    yield check
    wanted: Counter[str] = Counter(f"{d.op} {d.weight}/{d.activation}" for d in spec.layers.values())
    for what, other in (("spec", wanted), ("manifest", subject.manifest.census)):
        odd = sorted(key for key in {*census, *other} if census.get(key, 0) != other.get(key, 0))
        texts = [f"{key}: must be {other.get(key, 0)} as in the {what}, got {census.get(key, 0)}" for key in odd]
        yield none_of(f"census of the graph is the {what}'s", texts)
    files = subject.engine_manifest.graphs.unet  # a base has two: for adapters of attention, and for those of any layer
    for file in (files[name] for name in (LOWERING, WIDE) if name in files and files[name] != subject.unet_path.name):
        yield _layers_of(subject, subject.graph(file), f"layers of {file} that differ from the spec")[0]


def _layers_of(subject: Subject, graph: Graph, what: str) -> tuple[Check, Counter[str]]:
    """The check `what` over one of the UNet's graphs, and how many layers of each kind it has."""
    problems, culprit = list[str](), ""
    census: Counter[str] = Counter()
    for name, decision in subject.spec_file.spec.layers.items():
        found = layer_in_graph(graph, name)
        census[f"{decision.op} {found.weight_kind(decision)}/{found.activation_kind}"] += 1
        wrong = _layer_problems(found, decision, name, subject.spec_file.tensors)
        culprit = culprit or (name if wrong else "")
        problems += wrong
    return none_of(what, problems, culprit), census


class LayerInGraph:
    """One Conv or Linear as the graph has it: the node, its weight, and the Q/DQ constants around it."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph, self.name = graph, name
        self.tensor: Tensor | None = graph.tensors.get(f"{name}.weight")
        self.node = self._consumer()
        self.weight_dq, self.input_dq, self.output_q = self._around()

    def _consumer(self) -> Node | None:
        """The Conv or MatMul that the weight ends in, through Cast, Transpose and DequantizeLinear."""
        value = f"{self.name}.weight"
        for _ in range(5):
            readers = self.graph.readers.get(value, [])
            if not readers:
                return None
            if readers[0].op in ("Conv", "MatMul", "Gemm"):
                return readers[0]
            value = readers[0].outputs[0]
        return None

    def _around(self) -> tuple[Node | None, Node | None, Node | None]:
        if self.node is None:
            return None, None, None
        made = [self.graph.producers.get(value) for value in self.node.inputs[:2]]
        data, weight = (node if node is not None and node.op == "DequantizeLinear" else None for node in made)
        readers = self.graph.readers.get(self.node.outputs[0], [])
        output = next((reader for reader in readers if reader.op == "QuantizeLinear"), None)
        return weight, data, output

    def weight_kind(self, decision: LayerSpec) -> str:
        """'int8', 'int7', 'int6', 'int4' or 'float'. 7 and 6 bits are stored in a byte: the spec says which it is."""
        if self.tensor is None or self.tensor.kind not in ("int8", "int4"):
            return "float"
        lies_in_a_byte = self.tensor.kind == "int8" and decision.weight in ("int7", "int6")
        return decision.weight if lies_in_a_byte else self.tensor.kind

    @property
    def activation_kind(self) -> str:
        return "int8" if self.input_dq is not None else "float"


def layer_in_graph(graph: Graph, name: str) -> LayerInGraph:
    """Find a layer by its checkpoint name."""
    return LayerInGraph(graph, name)


def _layer_problems(
    found: LayerInGraph, decision: LayerSpec, name: str, tensors: dict[str, npt.NDArray[Any]]
) -> list[str]:
    if found.node is None:
        return [f"{name}: must be a layer of the graph, got none that reads its weight; export again"]
    if (decision.weight, decision.activation) != (found.weight_kind(decision), found.activation_kind):
        got = f"{found.weight_kind(decision)}/{found.activation_kind}"
        return [f"{name}: must be {decision.weight}/{decision.activation} as the spec says, got {got}"]
    pairs = [
        ("weight_scale", found.weight_dq, decision.weight != "float"),
        ("input_scale", found.input_dq, decision.activation != "float"),
        ("output_scale", found.output_q, decision.op == "conv" and decision.activation != "float"),
    ]
    problems: list[str] = []
    for scale, node, wanted in pairs:
        if wanted:
            problems += _scale_problems(found.graph, f"{name}.{scale}", node, tensors)
    return problems


def _scale_problems(graph: Graph, key: str, node: Node | None, tensors: dict[str, npt.NDArray[Any]]) -> list[str]:
    """Scale bit for bit the spec's; zero point 0, or 128 where the integers are written as uint8."""
    if node is None:
        return [f"{key}: must be in the graph, got no Quantize there; export again"]
    scale = graph.constant(node.inputs[1])
    zero = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.int8)
    if scale is None or zero is None:
        return [f"{key}: must be a constant of the graph, got a computed value; export again"]
    wanted = np.asarray(tensors[key], np.float32).T  # (O,) as it is; in blocks (N, K / length) the graph holds it by K
    if scale.size != wanted.size or not np.array_equal(scale.reshape(-1), wanted.reshape(-1)):
        ratio = float(np.max(np.abs(scale.reshape(-1)[0] / wanted.reshape(-1)[0])))
        return [f"{key}: must be the spec's bit for bit, got {ratio:.4g} times it; export again"]
    middle = 128 if zero.dtype == np.uint8 else 0
    if np.any(zero != middle):
        odd = int(zero.reshape(-1)[np.argmax(zero.reshape(-1) != middle)])
        return [f"{key}: zero point must be {middle}, got {odd}; export again"]
    return []


def stored_weights(subject: Subject) -> Iterator[Check]:
    """Integers on disk, in every lowering, are the spec's arithmetic on the checkpoint's weights; floats are those weights."""
    read = subject.sources.weights
    if read is None:
        return
    graphs = subject.manifest.graphs
    files = {"text_rows": graphs.text_rows, "text_encoder": graphs.text_encoder, "vae_decoder": graphs.vae_decoder}
    files |= {"text_encoder_2": graphs.text_encoder_2} if graphs.text_encoder_2 else {}
    files |= {f"unet.{lowering}": file for lowering, file in graphs.unet.items() if lowering != LOWERING}
    opened = {"unet": subject.unet, **{name: subject.graph(file) for name, file in files.items()}}
    layers, tensors = subject.spec_file.spec.layers, subject.spec_file.tensors
    for name, graph in opened.items():
        problems, culprit, component = list[str](), "", COMPONENT_OF[name.partition(".")[0]]
        for tensor in graph.tensors.values():
            layer = tensor.name.removesuffix(".weight")
            decision = layers.get(layer) if component == "unet" and tensor.name.endswith(".weight") else None
            wrong = _stored_problem(tensor, decision, tensors, partial(read, component))
            culprit = culprit or (layer.removesuffix(".bias") if wrong else "")
            problems += wrong
        yield none_of(f"{name}: tensors that are not the checkpoint's", problems, culprit)


def _stored_problem(
    tensor: Tensor,
    decision: LayerSpec | None,
    tensors: dict[str, npt.NDArray[Any]],
    read: Callable[[str], npt.NDArray[Any]],
) -> list[str]:
    """[] when the tensor is as it must be, or is no tensor of the checkpoint."""
    if "." not in tensor.name:
        return []
    stored = tensor.read()
    given = tensors.get(tensor.name, tensors.get(f"{tensor.name}.tuned"))  # values that the spec itself brings
    try:
        weight = read(tensor.name) if given is None else given
    except PersonalQError:
        return []  # a constant of the graph, made by a pass: named like its layer, '<layer>_1'
    if decision is not None and decision.weight != "float":
        layer = tensor.name.removesuffix(".weight")
        qtype, scale = QTYPES[decision.weight], tensors[f"{layer}.weight_scale"]
        learnt = decision.rounding == "stored"
        weight = tensors[f"{layer}.weight_q"] if learnt else quantize(weight, scale, qtype, 0)
        weight = weight.T if decision.op == "linear" else weight
    else:
        weight = weight.astype(stored.dtype)
    if stored.shape != weight.shape:
        return [f"{tensor.name}: must have shape {list(weight.shape)}, got {list(stored.shape)}; export again"]
    wrong = int((stored != weight).sum())
    what = "integers" if stored.dtype == np.int8 else "values"
    return [f"{tensor.name}: must be the spec's arithmetic, got {wrong} other {what}; export again"] if wrong else []


def kept_rows_pass_no_quantiser(subject: Subject) -> Iterator[Check]:
    """No node between the row encoder's rows and attention rounds a kept row to integers."""
    if subject.manifest.rows.form != "split":
        return
    problems = [
        f"unet: {node.name} ({node.op}) stands between 'kept' and attention; export again"
        for node in _forward(subject.unet, "kept", PRODUCTS)
        if node.op in QUANTISERS
    ]
    rows = subject.graph(subject.manifest.graphs.text_rows)
    problems += [
        f"text_rows: {node.name} ({node.op}) stands before 'kept'; export again"
        for node in _backward(rows, "kept")
        if node.op in QUANTISERS
    ]
    yield none_of("kept rows: quantisers on their way", problems)


def _forward(graph: Graph, value: str, until: tuple[str, ...]) -> Iterator[Node]:
    """Nodes that `value` reaches, up to and without those of the kinds `until`."""
    seen, queue = {value}, [value]
    while queue:
        for node in graph.readers.get(queue.pop(), []):
            if node.op in until:
                continue
            yield node
            fresh = [output for output in node.outputs if output not in seen]
            seen.update(fresh)
            queue += fresh


def _backward(graph: Graph, value: str) -> Iterator[Node]:
    """Nodes that `value` is computed from."""
    seen, queue = {value}, [value]
    while queue:
        node = graph.producers.get(queue.pop())
        if node is None:
            continue
        yield node
        fresh = [source for source in node.inputs if source not in seen]
        seen.update(fresh)
        queue += fresh


def kept_tokens(subject: Subject) -> Iterator[Check]:
    """A kept trigger or class noun is the checkpoint's own, as its tokenizer spells it."""
    kept, checkpoint, tokenizer = subject.manifest.rows.kept, subject.manifest.checkpoint, subject.pipeline.tokenizer
    problems = []
    for what, sequences, words in (
        ("trigger", kept.trigger, checkpoint.trigger),
        ("class_noun", kept.class_noun, (checkpoint.class_noun,) if checkpoint.class_noun else ()),
    ):
        known = [tokenizer.token_ids(word) for word in words]
        problems += [
            f"rows.kept.{what}: must be ids of {', '.join(words) or 'nothing'} ({known}), got {list(ids)}"
            for ids in sequences
            if tuple(ids) not in known
        ]
    yield none_of("kept tokens are the checkpoint's words", problems)


def same_row_same_effect(subject: Subject) -> Iterator[Check]:
    """A row has the same effect whichever way it comes in: through `rest` at its place, or through a kept slot.

    Scales of a power of two make both forms hold the same numbers exactly, so the predictions must be equal bit for bit:
    a row read at a wrong place, from a wrong slot or through a quantiser changes them.
    """
    if subject.manifest.rows.form != "split":
        return
    different = 0
    chosen = [i for i, prompt in enumerate(subject.rows) if prompt.kept]
    for i in chosen:
        prompt = subject.rows[i]
        plain = {name: np.array(value) for name, value in prompt.conditioning.items()}
        plain["rest_scale"] = np.full_like(plain["rest_scale"], 2.0**-6)
        plain["row_index"] = np.arange(plain["row_index"].shape[1], dtype=np.int64)[None]
        slots = {name: np.array(value) for name, value in plain.items()}
        slots["row_index"] = np.array(prompt.conditioning["row_index"])
        for slot, position in enumerate(prompt.kept):
            slots["kept"][0, slot] = plain["rest"][0, position].astype(np.float16) * np.float16(2.0**-6)
            slots["rest"][0, position] = 0
        same = np.array_equal(subject.noise_pred(plain, 0), subject.noise_pred(slots, 0))
        different += 0 if same else 1
    if chosen:
        yield equal("kept rows: prompts in which a slot and its place differ", different, 0)
