"""A whole bundle in miniature: four small ONNX graphs, a tokenizer, goldens and a manifest, built in a moment."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq import numerics
from personalq.bundle import (
    MANIFEST,
    CheckpointEntry,
    FileEntry,
    Graphs,
    Latent,
    Manifest,
    Rows,
    Sizes,
    SpecEntry,
    Text,
    bundle_key,
    file_sha256,
    manifest_bytes,
)
from personalq.rows import KeptTokens, RowLayer, pack_layers, packed_width
from personalq.spec import LayerSpec, RowsSpec, Spec, SpecFile, read_spec

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny_tokenizer.json"
VOCABULARY, CHANNELS, SLOTS = 585, 8, 4
LAYERS = pack_layers([("mid.attn2", 4), ("up.attn2", 4)])
R, L = packed_width(LAYERS), len(LAYERS)
# The UNet's layers, the block they are in, the scales of their inputs, and the values of one output of each.
CONV, LINEAR, BLOCK = "block.conv2", "told", "block"
SCALES, OUTPUT_SCALE = {CONV: 0.05, LINEAR: 0.02}, 0.04
SIZES = {CONV: 256, LINEAR: 4}
KEPT = KeptTokens(slots=SLOTS, trigger=((575,), (583, 584)), bos=True)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}


class GraphBuilder:
    """Nodes and initializers of one ONNX graph."""

    def __init__(self) -> None:
        import onnx

        self.onnx, self.nodes, self.initializers, self.count = onnx, [], [], 0

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        self.count += 1
        name = f"c{self.count}"
        self.initializers.append(self.onnx.numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        self.count += 1
        name = out or f"v{self.count}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], name=f"n{self.count}", **attributes))
        return name

    def fake_quantize(self, x: str, scale: float, out: str = "") -> str:
        s, zero = self.constant(scale), self.constant(0, np.int8)
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, s, zero), s, zero, out=out)

    def weight(self, layer: str, w: np.ndarray, axis: int, *, quantised: bool) -> str:
        """The weight of a layer, named as in an export: '<layer>.weight'."""
        name = f"{layer}.weight"
        scale = numerics.absmax_scale(w, numerics.INT8, axis)
        stored = numerics.quantize(w, scale, numerics.INT8, axis) if quantised else w.astype(np.float32)
        self.initializers.append(self.onnx.numpy_helper.from_array(stored, name))
        if not quantised:
            return name
        q = name
        zero = self.constant(np.zeros(scale.shape), np.int8)
        return self.op("DequantizeLinear", q, self.constant(scale), zero, axis=axis)

    def save(self, file: Path, inputs: dict[str, tuple[Any, list]], outputs: dict[str, tuple[Any, list]]) -> None:
        helper = self.onnx.helper
        infos = [
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
                for name, (dtype, shape) in group.items()
            ]
            for group in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, file.stem, infos[0], infos[1], self.initializers)
        self.onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(file))


def write_text_encoder(file: Path, random: np.random.Generator) -> None:
    graph = GraphBuilder()
    table = graph.constant(random.standard_normal((VOCABULARY, CHANNELS)))
    embedded = graph.op("Gather", table, "input_ids")
    place = graph.constant(random.standard_normal((1, 77, CHANNELS)) * 0.3)
    graph.op("Add", embedded, place, out="last_hidden_state")
    graph.save(file, {"input_ids": (np.int64, ["B", 77])}, {"last_hidden_state": (np.float32, ["B", 77, CHANNELS])})


def write_text_rows(file: Path, random: np.random.Generator, form: str, rows_side: int | str) -> None:
    graph = GraphBuilder()
    weight = graph.constant(random.standard_normal((CHANNELS, R)) / 3)
    rows = graph.op("MatMul", "text_embeds", weight, out="rows")
    inputs = {"text_embeds": (np.float32, ["B", rows_side, CHANNELS])}
    outputs = {"rows": (np.float32, ["B", rows_side, R])}
    if form == "split":
        parts = graph.op("Reshape", rows, graph.constant([0, -1, 2 * L, R // (2 * L)], np.int64))
        peak = graph.op("ReduceMax", graph.op("Abs", parts), graph.constant([-1], np.int64), keepdims=1)
        scale = graph.op("Max", graph.op("Div", peak, graph.constant(127.0)), graph.constant(2.0**-14))
        steps = graph.op("Round", graph.op("Div", parts, scale))
        graph.op("Squeeze", scale, graph.constant([-1], np.int64), out="rest_scale")
        flat = graph.op("Reshape", steps, graph.constant([0, -1, R], np.int64))
        graph.op("Cast", flat, out="rest", to=graph.onnx.TensorProto.INT8)
        index = graph.op("Unsqueeze", "kept_index", graph.constant([-1], np.int64))
        kept = graph.op("GatherND", rows, index, batch_dims=1)
        graph.op("Cast", kept, out="kept", to=graph.onnx.TensorProto.FLOAT16)
        inputs["kept_index"] = (np.int64, ["B", SLOTS])
        outputs |= {"rest": (np.int8, ["B", rows_side, R]), "rest_scale": (np.float32, ["B", rows_side, 2 * L])}
        outputs["kept"] = (np.float16, ["B", SLOTS, R])
    graph.save(file, inputs, outputs)


def unet_weights() -> dict[str, np.ndarray]:
    """The UNet's two layers as torch would hold them: conv [O,I,kh,kw], linear [N,K]."""
    random = np.random.default_rng(2)
    conv, linear = random.standard_normal((4, 4, 3, 3)) / 6, random.standard_normal((R // 2, 4)) / 2
    return {CONV: conv.astype(np.float32), LINEAR: linear.T.astype(np.float32)}


def write_unet(file: Path, form: str, rows_side: int | str = 77, *, quantised: bool) -> None:
    """Two attentions over the text rows, a Linear on what they find, a Conv on the sample, and their sum."""
    graph, weights = GraphBuilder(), unet_weights()
    inputs = {"sample": (np.float32, ["B", 4, "h", "w"]), "timestep": (np.float32, [1])}
    if form == "split":
        parts = graph.op(
            "Reshape", graph.op("Cast", "rest", to=1), graph.constant([0, -1, 2 * L, R // (2 * L)], np.int64)
        )
        scale = graph.op("Unsqueeze", "rest_scale", graph.constant([-1], np.int64))
        rest = graph.op("Reshape", graph.op("Mul", parts, scale), graph.constant([0, -1, R], np.int64))
        both = graph.op("Concat", rest, graph.op("Cast", "kept", to=1), axis=1)
        index = graph.op("Unsqueeze", "row_index", graph.constant([-1], np.int64))
        rows = graph.op("GatherND", both, index, batch_dims=1)
        inputs |= {"rest": (np.int8, ["B", rows_side, R]), "rest_scale": (np.float32, ["B", rows_side, 2 * L])}
        inputs |= {"kept": (np.float16, ["B", SLOTS, R]), "row_index": (np.int64, ["B", rows_side])}
    else:
        rows, inputs["rows"] = "rows", (np.float32, ["B", rows_side, R])
    query = graph.op("ReduceMean", "sample", graph.constant([2, 3], np.int64), keepdims=0)
    query = graph.op("Unsqueeze", query, graph.constant([1, 2], np.int64))
    found = graph.op("Concat", *(attend(graph, query, rows, layer) for layer in LAYERS), axis=-1)
    found = graph.op("Squeeze", found, graph.constant([1, 2], np.int64))
    sample = "sample"
    if quantised:
        found, sample = graph.fake_quantize(found, SCALES[LINEAR]), graph.fake_quantize(sample, SCALES[CONV])
    weight = graph.weight(CONV, weights[CONV], 0, quantised=quantised)
    conv = graph.op("Conv", sample, weight, pads=[1, 1, 1, 1])
    conv = graph.fake_quantize(conv, OUTPUT_SCALE) if quantised else conv
    told = graph.op("MatMul", found, graph.weight(LINEAR, weights[LINEAR].T, 1, quantised=quantised))
    told = graph.op("Unsqueeze", told, graph.constant([2, 3], np.int64))
    when = graph.op("Mul", "timestep", graph.constant(1e-4))
    graph.op("Add", graph.op("Add", conv, told), when, out="noise_pred")
    graph.save(file, inputs, {"noise_pred": (np.float32, ["B", 4, "h", "w"])})


def attend(graph: GraphBuilder, query: str, rows: str, layer: RowLayer) -> str:
    """query (B,1,1,4) over the layer's slice of the rows -> (B,1,1,4)."""
    sides = []
    for start in (layer.offset, layer.offset + layer.width):
        ends = [graph.constant([value], np.int64) for value in (start, start + layer.width, 2)]
        sides.append(graph.op("Unsqueeze", graph.op("Slice", rows, *ends), graph.constant([1], np.int64)))
    scores = graph.op("MatMul", query, graph.op("Transpose", sides[0], perm=[0, 1, 3, 2]))
    return graph.op("MatMul", graph.op("Softmax", scores, axis=-1), sides[1])


def tiny_spec(*, quantised: bool) -> SpecFile:
    """The spec that write_unet obeys."""
    tensors: dict[str, np.ndarray] = {}
    kind = "int8" if quantised else "float"
    if quantised:
        for name, weight in unet_weights().items():
            tensors[f"{name}.weight_scale"] = numerics.absmax_scale(weight, numerics.INT8, 0)
            tensors[f"{name}.input_scale"] = np.asarray(SCALES[name], np.float32)
        tensors[f"{CONV}.output_scale"] = np.asarray(OUTPUT_SCALE, np.float32)
    layers = {name: LayerSpec(op=op, weight=kind, activation=kind) for name, op in ((CONV, "conv"), (LINEAR, "linear"))}
    policy, bits = ("taq", "w8a8") if quantised else ("fp32", "fp32")
    rows = RowsSpec(kept=KEPT, layers=tuple(LAYERS))
    named = {"name": policy, "policy": policy, "bits": bits, "checkpoint": "moss-mug", "family": "tiny"}
    return SpecFile(Spec(**named, storage="float32", layers=layers, rows=rows), tensors)


def write_decoder(file: Path, random: np.random.Generator) -> None:
    graph = GraphBuilder()
    mixed = graph.op("Conv", "latent", graph.constant(random.standard_normal((3, 4, 1, 1)) / 2))
    scales = graph.constant([1, 1, 2, 2])
    large = graph.op("Resize", mixed, "", scales, mode="nearest")
    graph.op("Tanh", large, out="image")
    graph.save(file, {"latent": (np.float32, ["B", 4, "h", "w"])}, {"image": (np.float32, ["B", 3, "H", "W"])})


def write_bundle(
    folder: Path, *, form: str = "split", quantised: bool = True, is_open: bool = False, **changes: Any
) -> Path:
    """A bundle without goldens. The same weights in every form. is_open: for any number of text rows, as exported since 6."""
    folder.mkdir(parents=True)
    seeds = [np.random.default_rng(seed) for seed in range(4)]
    write_text_encoder(folder / "text_encoder.onnx", seeds[0])
    rows_side = "T" if is_open else 77
    write_text_rows(folder / "text_rows.onnx", seeds[1], form, rows_side)
    write_unet(folder / "unet.ort.onnx", form, rows_side, quantised=quantised)
    tiny_spec(quantised=quantised).write(folder / "spec.json")
    write_decoder(folder / "vae_decoder.onnx", seeds[3])
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    kind = "int8/int8" if quantised else "float/float"
    bits, policy = ("w8a8", "taq") if quantised else ("fp32", "fp32")
    settings: dict[str, Any] = {
        "key": folder.name,
        "key_parts": {"weights": "0"},
        "checkpoint": CheckpointEntry(
            id="moss-mug",
            name="Moss mug",
            kind="textual_inversion",
            base="tiny",
            trigger=("sks", "<moss-mug>"),
            sha256="0",
        ),
        "family": "tiny",
        "exporter_version": "1",
        "spec": SpecEntry(name=policy, policy=policy, bits=bits, sha256="0", storage="float32"),
        "graphs": Graphs(
            unet={"ort": "unet.ort.onnx"},
            text_rows="text_rows.onnx",
            text_encoder="text_encoder.onnx",
            vae_decoder="vae_decoder.onnx",
        ),
        "rows": Rows(form=form, width=R, layers=tuple(LAYERS), kept=KEPT, is_open=is_open),
        "text": Text(bos_id=581, eos_id=582, pad_id=582, expansions={"<moss-mug>": "<moss-mug> <moss-mug>_1"}),
        "latent": Latent(height=8, width=8, scale=2, scaling_factor=0.5),
        "scheduler": SCHEDULER,
        "steps": 4,
        "guidance": 3.0,
        "sizes": Sizes(unet=1, unet_fp16=2, unet_fp32=4),
        "census": {f"conv {kind}": 1, f"linear {kind}": 1},
    }
    seal(folder, Manifest(**{**settings, **changes}))
    return folder


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest with the hashes of what lies in the folder, and a key that follows from them."""
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and file.name != MANIFEST)
    files = {name: FileEntry(sha256=file_sha256(folder / name), bytes=(folder / name).stat().st_size) for name in names}
    parts = dict(manifest.key_parts)
    spec = manifest.spec
    if (folder / "spec.json").is_file():
        spec = spec.model_copy(update={"sha256": read_spec(folder / "spec.json").content_sha256()})
        parts["spec"] = spec.sha256
    if (folder / "golden.safetensors").is_file():
        parts["reference"] = file_sha256(folder / "golden.safetensors")
    fields = {"files": files, "key_parts": parts, "key": bundle_key(parts), "spec": spec}
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest.model_copy(update=fields)))


def write_golden(folder: Path, reference: Path) -> None:
    """Goldens of `folder`, computed with the unquantised bundle `reference` of the same weights."""
    from safetensors.numpy import save_file

    from personalq.bundle import read_manifest
    from runtime.drawing.pipeline import Pipeline, start_noise
    from runtime.drawing.samplers import SAMPLERS, Trail, plan_steps, predict
    from runtime.engines.ort import OrtEngine

    engine = OrtEngine(reference, threads=1)
    pipeline = Pipeline(engine)
    prompts = ["", "a photo of sks dog on the beach", "<moss-mug> in the snow"]
    random = np.random.default_rng(7)
    ids = np.stack([pipeline.tokenizer.encode(prompt).ids for prompt in prompts])
    embeds = engine.encode(ids).states
    rows = engine.text_rows(embeds, np.zeros((3, SLOTS), np.int64))["rows"]
    prompt, times = np.array([1, 2, 0, 1]), np.array([999, 700, 400, 100], np.float32)
    sample = random.standard_normal((4, 4, 8, 8)).astype(np.float32)
    noise_pred = [
        engine.denoiser({"rows": rows[p][None]}, 8, 8)(x[None], float(t))[0].copy()
        for p, t, x in zip(prompt, times, sample, strict=True)
    ]
    plan, schedule, steps = plan_steps("ddim", pipeline.schedule, 4), pipeline.schedule, np.array([0, 1, 2, 3])
    stepped = [
        SAMPLERS["ddim"].step(schedule, plan, i, x, predict(schedule, plan, i, x, out, np.inf), x, Trail())
        for i, x, out in zip(steps, sample, noise_pred, strict=True)
    ]
    latent = random.standard_normal((2, 4, 8, 8)).astype(np.float32)
    noise = np.stack([start_noise(seed, (4, 8, 8)) for seed in range(2)])
    images = [pipeline.image(prompts[p], noise=x) for p, x in zip((1, 2), noise, strict=True)]
    tensors = {
        "ids": ids,
        "text_embeds": embeds,
        "rows": rows,
        "sample": sample,
        "timestep": times,
        "prompt": prompt,
        "noise_pred": np.stack(noise_pred),
        "latent": latent,
        "decoded": engine.decode(latent),
        "image_prompt": np.array([1, 2]),
        "start_noise": noise,
        "images": np.stack(images),
        "next_step": steps,
        "next_sample": np.stack(stepped),
        **inner_outputs(reference, rows[prompt], times, sample),
    }
    metadata = {
        "version": "2",
        "checkpoint_sha256": "0",
        "prompts": json.dumps(prompts),
        "steps": "4",
        "guidance": "3.0",
    }
    metadata |= {"layers": json.dumps(SIZES), "blocks": json.dumps({BLOCK: 256})}
    save_file(tensors, folder / "golden.safetensors", metadata)
    seal(folder, read_manifest(folder))


def inner_outputs(reference: Path, rows: np.ndarray, times: np.ndarray, sample: np.ndarray) -> dict[str, np.ndarray]:
    """Samples of what the unquantised graph computes inside, for golden inputs."""
    from runtime.engines.onnxfile import read_graph
    from runtime.engines.sessions import open_session
    from runtime.gate.taps import find_taps, tapped

    graph = read_graph(reference / "unet.ort.onnx")
    taps = find_taps(graph, list(SIZES), [BLOCK], tuple(LAYERS))
    session = open_session(graph.path, 1, model=tapped(graph, taps, SIZES | {BLOCK: 256}))
    names = [f"gate_layer_{name}" for name in SIZES] + [f"gate_block_{BLOCK}"]
    names += [f"gate_attention_{i}" for i in range(L)]
    runs = [
        session.run(names, {"sample": x[None], "timestep": t[None], "rows": r[None]})
        for x, t, r in zip(sample, times, rows, strict=True)
    ]
    n = len(SIZES)
    groups = {"layers": slice(0, n), "blocks": slice(n, n + 1), "attention": slice(n + 1, None)}
    return {name: np.stack([np.stack(run[part]) for run in runs]) for name, part in groups.items()}


@pytest.fixture(scope="session")
def made_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """'split': W8A8 with kept rows; 'full': the float32 reference. Read only: copy before changing one."""
    pytest.importorskip("onnx", reason="onnx builds the graphs of the tiny bundle")
    root = tmp_path_factory.mktemp("bundles")
    full = write_bundle(root / "full0000", form="full", quantised=False)
    split = write_bundle(root / "split000")
    for folder in (full, split):
        write_golden(folder, full)
    return {"split": split, "full": full}


@pytest.fixture
def bundle(made_bundles: dict[str, Path]) -> Path:
    return made_bundles["split"]


@pytest.fixture
def reference(made_bundles: dict[str, Path]) -> Path:
    return made_bundles["full"]


@pytest.fixture
def open_bundle(tmp_path: Path) -> Path:
    """W8A8 with kept rows, whose graphs take any number of text rows."""
    pytest.importorskip("onnx", reason="onnx builds the graphs of the tiny bundle")
    return write_bundle(tmp_path / "open0000", is_open=True)


@pytest.fixture
def copied(made_bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the split bundle that a test may spoil."""
    return Path(shutil.copytree(made_bundles["split"], tmp_path / "spoiled0"))


@pytest.fixture
def make_bundle(made_bundles: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Build a bundle with other manifest fields: make_bundle(name, steps=3)."""

    def make(name: str, **settings: Any) -> Path:
        return write_bundle(tmp_path / name, **settings)

    return make


@pytest.fixture
def reseal() -> Callable[..., None]:
    """reseal(folder, steps=3): write the manifest anew with the hashes of what lies there now."""
    from personalq.bundle import read_manifest

    def again(folder: Path, **changes: Any) -> None:
        seal(folder, read_manifest(folder).model_copy(update=changes))

    return again
