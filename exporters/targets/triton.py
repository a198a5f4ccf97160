"""A bundle as models of a Triton model repository: text encoder, text rows, UNet and decoder, each a folder of its own.

Files are hard-linked where possible, so a hundred checkpoints over one base take no more space than their bundles. The
quantised UNet is written as ONNX Runtime optimises it for the CPU, because Triton's backend cannot turn off a single optimiser
(MatMulAddFusion, which would turn a quantised Linear into a float one); a TensorRT plan takes its place if there is one.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from personalq.bundle import Manifest, read_manifest
from personalq.errors import MissingExtraError, ParityError
from personalq.repository.atomic import atomic_directory, named_failure
from personalq.repository.engines import KeptEngine, check_engine, engines_of

from .tensorrt import GRAPH as PLAN_GRAPH
from .triton_config import ModelConfig, Port, config_text, parse_config, ports_of

VERSION, CONFIG, MODEL, PLAN = "1", "config.pbtxt", "model.onnx", "model.plan"
DISABLED = ["MatMulAddFusion"]
Session = Any  # onnxruntime.InferenceSession


@dataclass(frozen=True)
class Part:
    """One graph of a bundle and its data file."""

    name: str
    graph: str
    data: str


def write_triton(bundle: Path, place: Path) -> list[str]:
    """Write the bundle's models into the Triton model repository `place`; return their names.

    A model that is there is replaced whole. Raises BundleError, ParityError or RepositoryError.
    """
    manifest = read_manifest(bundle)
    name = model_name(manifest.checkpoint.id)
    with named_failure(place):
        place.mkdir(parents=True, exist_ok=True)
    made = []
    for part in parts_of(manifest):
        with atomic_directory(place / f"{name}-{part.name}", replace=True) as folder:
            (folder / VERSION).mkdir()
            config = _write_model(bundle, manifest, part, f"{name}-{part.name}", folder / VERSION)
            text = config_text(config)
            parse_config(text)
            (folder / CONFIG).write_text(text)
        made.append(f"{name}-{part.name}")
    return made


def model_name(checkpoint_id: str) -> str:
    """A checkpoint's name in URLs and folders: its id, or, where that has other characters, a readable form with a hash."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", checkpoint_id).strip("-.")
    digest = hashlib.sha256(checkpoint_id.encode()).hexdigest()[:8]
    return plain if plain == checkpoint_id else f"{plain}-{digest}"


def parts_of(manifest: Manifest) -> list[Part]:
    """Every model of a bundle."""
    graphs = manifest.graphs
    encoders = {"text_encoder": graphs.text_encoder, "text_encoder_2": graphs.text_encoder_2}
    found = {**{name: file for name, file in encoders.items() if file}, "text_rows": graphs.text_rows}
    small = [Part(name, file, f"{Path(file).stem}.data") for name, file in found.items()]
    decoder = Part("vae_decoder", graphs.vae_decoder, f"{Path(graphs.vae_decoder).stem}.data")
    return [*small, Part("unet", graphs.unet["ort"], "weights.data"), decoder]


def _write_model(bundle: Path, manifest: Manifest, part: Part, name: str, folder: Path) -> ModelConfig:
    """Write one model's files into its version folder and return its configuration for Triton."""
    tags = {"checkpoint": manifest.checkpoint.id, "bundle": manifest.key[:12], "spec": manifest.spec.name}
    plans = sorted(_plain_plans(bundle), key=lambda kept: kept.path.stat().st_mtime_ns)
    if part.name == "unet" and plans:
        return _write_plan(bundle, plans[-1], name, folder, tags)
    graph = ir.load(bundle / part.graph).graph
    inputs, outputs = ports_of(graph.inputs), ports_of(graph.outputs)
    if part.name == "unet" and manifest.rows.form == "split":
        write_optimised(bundle / part.graph, folder, manifest)
        return ModelConfig(name, "onnxruntime", MODEL, inputs, outputs, "KIND_CPU", is_optimised=True, tags=tags)
    _link(bundle / part.graph, folder / MODEL)
    _link(bundle / part.data, folder / part.data)
    return ModelConfig(name, "onnxruntime", MODEL, inputs, outputs, tags=tags)


def _plain_plans(bundle: Path) -> list[KeptEngine]:
    """The plans that take no adapters: theirs is the graph whose inputs the configuration says."""
    return [kept for kept in engines_of(bundle, "tensorrt") if "set.rank" not in kept.manifest.parts]


def _write_plan(bundle: Path, plan: KeptEngine, name: str, folder: Path, tags: dict[str, str]) -> ModelConfig:
    check_engine(plan)
    _link(plan.path, folder / PLAN)
    graph = ir.load(bundle / PLAN_GRAPH).graph
    inputs = tuple(_within(port, plan.manifest.parts) for port in ports_of(graph.inputs))
    sample = next(port for port in inputs if port.name == "sample")
    outputs = tuple(Port(port.name, port.dtype, sample.dims) for port in ports_of(graph.outputs))
    return ModelConfig(name, "tensorrt", PLAN, inputs, outputs, "KIND_GPU", tags=tags)


def _within(port: Port, parts: Mapping[str, str]) -> Port:
    """An input with the sides its plan was built for: one number where the profile has one, else open."""
    profile = parts.get(f"shape.{port.name}")
    if profile is None:
        return port
    sides = zip(*(shape.split("x") for shape in profile.split("/")), strict=True)
    return Port(port.name, port.dtype, tuple(int(three[0]) if len(set(three)) == 1 else -1 for three in sides))


def write_optimised(graph: Path, folder: Path, manifest: Manifest) -> None:
    """Write the graph as ONNX Runtime fuses it (integer kernels, no hardware-bound layouts) and compare what it computes.

    Raises ParityError when the file, loaded without optimisers as Triton will, predicts something else.
    """
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / MODEL)
    options.log_severity_level = 3
    options.add_session_config_entry(
        "session.x64quantprecision", "1"
    )  # without VNNI: weights whose products do not saturate
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "model.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    made = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED)
    feed = sample_feed(made, (manifest.latent.height, manifest.latent.width))
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain.log_severity_level = 3
    written = ort.InferenceSession(str(folder / MODEL), plain, providers=["CPUExecutionProvider"])
    wanted, found = made.run(None, feed)[0], written.run(None, feed)[0]
    worst = float(np.abs(wanted - found).max()) / max(float(np.abs(wanted).max()), 1e-12)
    if not worst < 1e-4:
        raise ParityError(
            f"{graph.name}: the optimised graph must predict the same, got a difference of {worst:.2g} of the largest "
            "value; take another version of ONNX Runtime"
        )


def sample_feed(session: Session, sides: tuple[int, int]) -> dict[str, npt.NDArray[Any]]:
    """Seeded inputs of a quantised UNet: a batch of two latents of (height, width), every text row in its own place."""
    random, feed = np.random.default_rng(0), {}
    for value in session.get_inputs():
        open_ = iter((2, *sides))
        shape = tuple(side if isinstance(side, int) else next(open_) for side in value.shape)
        if value.name == "row_index":
            feed[value.name] = np.broadcast_to(np.arange(shape[1]), shape).astype(np.int64)
        elif value.type == "tensor(int8)":
            feed[value.name] = random.integers(-127, 128, shape).astype(np.int8)
        elif value.name == "timestep":
            feed[value.name] = np.full(shape, 500, np.float32)
        else:
            kind = np.float16 if value.type == "tensor(float16)" else np.float32
            scale = 0.01 if value.name == "rest_scale" else 1.0
            feed[value.name] = np.abs(random.standard_normal(shape) * scale).astype(kind)
    return feed


def _link(source: Path, place: Path) -> None:
    """A second name of a published file, or a copy on another file system."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    return onnxruntime
