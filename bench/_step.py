"""One UNet step on one engine, in a process of its own: inputs, engines, medians, and what every node took."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from personalq.bundle import Manifest, read_manifest

Run = Callable[[], Any]
Opened = tuple[Run, dict[str, Any]]  # one step, and facts about how it is run
Open = Callable[[Path, int, int], Opened]  # bundle, batch, threads (0: every core)
LENGTH = 77


def feeds(bundle: Path, batch: int) -> dict[str, Any]:
    """Seeded inputs of a bundle's UNet: latents, time step, rows in the bundle's form; SDXL's extras."""
    manifest = read_manifest(bundle)
    return {
        **conditioning(manifest, batch),
        "sample": latents(manifest, batch),
        "timestep": np.array([500], np.float32),
    }


def latents(manifest: Manifest, batch: int) -> Any:
    latent = manifest.latent
    shape = (batch, latent.channels, latent.height, latent.width)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def conditioning(manifest: Manifest, batch: int) -> dict[str, Any]:
    random, rows = np.random.default_rng(1), manifest.rows
    full = random.standard_normal((batch, LENGTH, rows.width)).astype(np.float32)
    made: dict[str, Any] = {"rows": full}
    if rows.form == "split":
        made = {
            "rest": np.clip(np.rint(full * 40), -128, 127).astype(np.int8),
            "rest_scale": np.full((batch, LENGTH, 2 * len(rows.layers)), 1 / 40, np.float32),
            "kept": full[:, : rows.kept.slots].astype(np.float16),
            "row_index": np.tile(np.arange(LENGTH), (batch, 1)),
        }
    if manifest.graphs.text_encoder_2:
        side = manifest.latent.height * manifest.latent.scale
        made["text_embeds"] = random.standard_normal((batch, 1280)).astype(np.float32)
        made["time_ids"] = np.tile(np.array([side, side, 0, 0, side, side], np.float32), (batch, 1))
    return made


def bundle_engine(name: str) -> Open:
    """The runtime's own engine on a bundle, bound as the pipeline binds it."""

    def opened(bundle: Path, batch: int, threads: int) -> Opened:
        from runtime.engines.engine import open_engine

        engine = open_engine(name, bundle, threads or None)
        manifest = engine.manifest
        denoise = engine.denoiser(conditioning(manifest, batch), manifest.latent.height, manifest.latent.width)
        sample = latents(manifest, batch)
        return lambda: denoise(sample, 500.0), {}

    return opened


def openvino_graph(precision: str) -> Open:
    """A graph as it is on OpenVINO, static shapes, with a precision hint."""

    def opened(bundle: Path, batch: int, threads: int) -> Opened:
        import openvino as ov

        inputs, core = feeds(bundle, batch), ov.Core()
        model = core.read_model(bundle / "unet.ort.onnx")
        model.reshape({value.any_name: list(inputs[value.any_name].shape) for value in model.inputs})
        hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        hints |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
        compiled = core.compile_model(model, "CPU", hints)
        request = compiled.create_infer_request()
        return lambda: request.infer(inputs, share_inputs=True), {"ran_in": product_types(compiled)}

    return opened


def product_types(compiled: Any) -> dict[str, int]:
    """What OpenVINO really computes convolutions and products in: '<layer type> <data type>' -> how many."""
    told = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [(one["layerType"].astype(str), one["runtimePrecision"].astype(str)) for one in told]
    wanted = ("Convolution", "FullyConnected", "MatMul")
    return dict(Counter(f"{layer} {dtype}" for layer, dtype in kinds if layer in wanted))


def peer_graph(bundle: Path, batch: int, threads: int) -> Opened:
    """quantize_static's graph on ONNX Runtime with its default optimisations, as its users run it."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    graph = bundle.parents[1] / "peer" / "unet.onnx"
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    inputs = feeds(bundle, batch)
    return lambda: session.run(None, inputs), {}


def torch_unet(dtype: str, is_compiled: bool) -> Open:
    """diffusers' UNet with the checkpoint's weights, K and V of the text in every step, as diffusers runs it."""

    def opened(bundle: Path, batch: int, threads: int) -> Opened:
        import torch
        from diffusers import UNet2DConditionModel

        from personalq.weights.checkpoint import open_weights

        torch.set_num_threads(threads or torch.get_num_threads())
        root, manifest = bundle.parents[1], read_manifest(bundle)
        config = json.loads((root / "bases" / "base" / "unet" / "config.json").read_text())
        kind = getattr(torch, dtype)
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        source = open_weights(root / "bases" / "base", root / "checkpoints" / manifest.checkpoint.id, "dreambooth")
        weights = source.component("unet")
        state = {name: torch.from_numpy(weights.read(name).copy()).to(kind) for name in weights.names()}
        unet.load_state_dict(state, assign=True)
        unet = unet.eval()
        run = torch.compile(unet) if is_compiled else unet
        sample = torch.from_numpy(latents(manifest, batch)).to(kind)
        embeds = torch.zeros(batch, LENGTH, config["cross_attention_dim"], dtype=kind)
        added = {}
        if manifest.graphs.text_encoder_2:
            added = {"text_embeds": torch.zeros(batch, 1280, dtype=kind), "time_ids": torch.ones(batch, 6, dtype=kind)}

        def step() -> Any:
            with torch.no_grad():
                return run(sample, 500, embeds, added_cond_kwargs=added, return_dict=False)[0]

        return step, {}

    return opened


# name -> (which bundle it reads, how it is opened)
ENGINES: Mapping[str, tuple[str, Open]] = {
    "torch eager fp32": ("fp32", torch_unet("float32", False)),
    "torch.compile bf16": ("fp32", torch_unet("bfloat16", True)),
    "onnxruntime fp32": ("fp32", bundle_engine("onnxruntime")),
    "openvino fp32": ("fp32", openvino_graph("f32")),
    "openvino bf16": ("fp32", openvino_graph("bf16")),
    "quantize_static on onnxruntime": ("fp32", peer_graph),
    "ours on onnxruntime": ("w8a8", bundle_engine("onnxruntime")),
    "ours on onnxruntime, w7a8": ("w7a8", bundle_engine("onnxruntime")),
    "ours on openvino": ("w8a8", bundle_engine("openvino")),
}


def timed(name: str, bundle: Path, batch: int, steps: int, threads: int) -> dict[str, Any]:
    """Open an engine, warm it up twice, time `steps` runs: seconds to open, median and all step times.

    cpu_s: processor time of each step. With one thread it is what the step takes on a machine that others use too.
    """
    started = time.perf_counter()
    run, told = ENGINES[name][1](bundle, batch, threads)
    opened = time.perf_counter() - started
    for _ in range(2):
        run()
    seconds, cpu = [], []
    for _ in range(steps):
        started, before = time.perf_counter(), time.process_time()
        run()
        seconds.append(round(time.perf_counter() - started, 5))
        cpu.append(round(time.process_time() - before, 5))
    found = {"median_s": statistics.median(seconds), "steps_s": seconds, "median_cpu_s": statistics.median(cpu)}
    return {**found, "cpu_s": cpu, "open_s": round(opened, 3), **told}


def profile(bundle: Path, batch: int, threads: int) -> list[dict[str, Any]]:
    """What one step of ONNX Runtime spends on each kind of node: {op, nodes, milliseconds, multiply_adds}."""
    from runtime.engines.sessions import open_session

    with tempfile.TemporaryDirectory() as folder:
        session = open_session(bundle / "unet.ort.onnx", threads or None, profile=Path(folder) / "profile")
        inputs = feeds(bundle, batch)
        for _ in range(3):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    kernels = conv_kernels(bundle / "unet.ort.onnx")
    runs: dict[str, list[dict[str, Any]]] = {}
    for event in nodes:
        runs.setdefault(event["name"], []).append(event)
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    work: Counter[str] = Counter()
    for events_of_node in runs.values():
        last = events_of_node[-1]
        op = last["args"]["op_name"]
        spent[op] += min(event["dur"] for event in events_of_node)
        count[op] += 1
        node = last["name"].removesuffix("_kernel_time").split("_token_")[0]  # fused nodes are called after the Conv
        work[op] += multiply_adds(op, last["args"], kernels.get(node, ()))
    return [
        {"op": op, "nodes": count[op], "milliseconds": round(us / 1e3, 2), "multiply_adds": work[op]}
        for op, us in spent.most_common()
    ]


def conv_kernels(graph: Path) -> dict[str, tuple[int, ...]]:
    """Conv node -> the shape of its weight (M,C,kh,kw). Integer kernels pack theirs away, so no profile shows it."""
    import onnx

    nodes = onnx.load(graph, load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in nodes.initializer}
    for node in nodes.node:
        if node.op_type in ("Cast", "DequantizeLinear") and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
    return {node.name: shapes[node.input[1]] for node in nodes.node if node.op_type == "Conv"}


def multiply_adds(op: str, args: dict[str, Any], kernel: tuple[int, ...]) -> int:
    """Multiply-adds of a Conv (whose weight has the shape `kernel`) or product node, from the profiler's shapes."""
    shapes = [next(iter(shape.values())) for shape in args.get("input_type_shape", [])]
    outputs = [next(iter(shape.values())) for shape in args.get("output_type_shape", [])]
    if "Conv" in op and len(outputs) == 1:
        return int(np.prod(outputs[0]) * np.prod(kernel[1:] or shapes[1][1:]))
    if "MatMul" in op or "Gemm" in op:
        return int(np.prod(outputs[0]) * shapes[0][-1])
    return 0


def int8_peak(threads: int, side: int = 2048) -> float:
    """Multiply-adds a second of one large int8 product, the quicker of ONNX Runtime and OpenVINO: what the machine does."""
    return max(peak_of_onnxruntime(threads, side), peak_of_openvino(threads, side))


def peak_of_onnxruntime(threads: int, side: int) -> float:
    """MatMulInteger, uint8 by int8, with ONNX Runtime's own choice of kernels (they saturate on a CPU without VNNI)."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.integers(-127, 128, (side, side)).astype(np.int8), "w")
    ends = [
        helper.make_tensor_value_info(*one, [side, side])
        for one in (("x", TensorProto.UINT8), ("y", TensorProto.INT32))
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "peak", ends[:1], ends[1:], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": random.integers(0, 256, (side, side)).astype(np.uint8)}
    return side**3 / shortest(lambda: session.run(None, feed))


def shortest(run: Run, times: int = 8) -> float:
    """Seconds of the quickest of some runs."""
    found = np.inf
    for _ in range(times):
        started = time.perf_counter()
        run()
        found = min(found, time.perf_counter() - started)
    return float(found)


def peak_of_openvino(threads: int, side: int) -> float:
    """A Linear with FakeQuantize before it and int8 weights, which OpenVINO computes in integers where it can."""
    import openvino as ov
    from openvino import opset13 as op

    q = op.parameter([side, side], ov.Type.f32, name="x")

    def grid(value: Any, low: float, high: float, levels: int) -> Any:
        ends = [op.constant(np.float32(v)) for v in (low, high, low, high)]
        return op.fake_quantize(value, *ends, levels)

    weight = op.constant(np.random.default_rng(0).integers(-127, 128, (side, side)).astype(np.int8))
    scaled = op.multiply(op.convert(weight, ov.Type.f32), op.constant(np.float32(0.01)))
    model = ov.Model([op.matmul(grid(q, 0, 6, 256), scaled, False, True)], [q])
    hints = {"PERFORMANCE_HINT": "LATENCY", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
    request = ov.Core().compile_model(model, "CPU", hints).create_infer_request()
    x = np.random.default_rng(1).random((side, side), np.float32) * 6
    return side**3 / shortest(lambda: request.infer([x]))


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    size, count_of_steps, n_threads = (int(number) for number in sys.argv[3:])
    if what == "profile":
        print(json.dumps({"nodes": profile(where, size, n_threads)}))
    elif what == "peak":
        print(json.dumps({"int8_peak": int8_peak(n_threads)}))
    else:
        print(json.dumps(timed(what, where, size, count_of_steps, n_threads)))
