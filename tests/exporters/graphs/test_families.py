"""Stable Diffusion 1.x, 2.x and XL: traced, exported and run without torch, each equals diffusers; others are refused."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from exporters.graphs.family import open_family
from exporters.lint import lint_trt
from exporters.plain import unquantised_spec
from exporters.targets.refit import sample_feed
from exporters.targets.settings import BuildSettings
from exporters.targets.tensorrt import GRAPH, graph_shapes
from personalq.architecture import read_configs
from personalq.errors import RepositoryError, SpecError
from personalq.repository import Repository
from personalq.spec import SpecFile
from runtime.drawing.pipeline import Pipeline, start_noise
from runtime.engines.engine import unet_feed
from runtime.engines.ort import OrtEngine
from runtime.engines.sessions import open_session

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
from tests.exporters.families import Made, eight_bits  # noqa: E402  (needs torch)
from tests.exporters.rtx import require_compiles  # noqa: E402
from tests.exporters.test_policies import SpecLayer  # noqa: E402

NAMES = ("sd1", "sd2", "sdxl")
# FP32 on both sides, sums in another order.
TOLERANCE = 1e-4
PROMPT = "a red mug on the beach! sks"


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, traces: Path) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param), traces)


def encode(made: Made, prompt: str) -> tuple[Any, Any]:
    """(states, pooled or None) as the diffusers pipeline encodes a prompt."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if made.name == "sdxl":
            states, _, pooled, _ = made.pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
            return states, pooled
        return made.pipe.encode_prompt(prompt, "cpu", 1, False)[0], None


def test_text_embeddings_equal_diffusers(made: Made) -> None:
    states, pooled = encode(made, PROMPT)
    ours = made.pipeline.embed([PROMPT])
    assert np.abs(ours.states - states.numpy()).max() <= TOLERANCE
    if pooled is None:
        assert ours.pooled is None
    else:
        assert np.abs(ours.pooled - pooled.numpy()).max() <= TOLERANCE


# Odd sides do not halve evenly: each downsampling rounds up, and each upsampling stops where its skip connection does.
SIZES = [(1, 8, 8), (3, 8, 12), (2, 16, 4), (1, 9, 8), (2, 7, 11), (1, 5, 12), (1, 3, 1)]


@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
def test_the_unet_equals_torch_at_any_batch_height_and_width(made: Made, batch: int, height: int, width: int) -> None:
    sample = np.random.default_rng(1).standard_normal((batch, 4, height, width)).astype(np.float32)
    rows = made.pipeline.rows(PROMPT).conditioning
    tiled = {name: np.repeat(value, batch, axis=0) for name, value in rows.items()}
    ours = made.pipeline.engine.denoiser(tiled, height, width)(sample, 321.0)
    assert np.abs(ours - predict(made, sample, 321.0)).max() <= TOLERANCE


def predict(made: Made, sample: np.ndarray, timestep: float) -> np.ndarray:
    """What diffusers' UNet says to PROMPT."""
    batch, states, pooled = len(sample), *encode(made, PROMPT)
    with torch.no_grad():
        added = None if pooled is None else added_conditions(pooled.repeat(batch, 1), sample)
        given = torch.from_numpy(sample), timestep, states.repeat(batch, 1, 1)
        return made.pipe.unet(*given, added_cond_kwargs=added).sample.numpy()


def added_conditions(pooled: Any, sample: np.ndarray) -> dict[str, Any]:
    """What SDXL's UNet is told beside the prompt."""
    size = [2 * side for side in sample.shape[2:]]
    ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32).repeat(len(sample), 1)
    return {"text_embeds": pooled, "time_ids": ids}


@pytest.mark.parametrize(
    ("negative", "height", "width"), [(None, 8, 12), ("a blue forest", 8, 12), (None, 9, 13), (None, 7, 4)]
)
def test_pictures_equal_diffusers(
    made: Made, negative: str | None, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents of odd sides too; diffusers' pipelines ask for a multiple of 8 pixels, whatever the VAE's scale is."""
    monkeypatch.setattr(made.pipe, "check_inputs", lambda *_, **__: None)
    noise = start_noise(3, (4, height, width))
    ours = made.pipeline.image(PROMPT, negative_prompt=negative or "", steps=3, guidance=4.0, noise=noise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = made.pipe(
            PROMPT,
            negative_prompt=negative,
            num_inference_steps=3,
            guidance_scale=4.0,
            height=2 * height,
            width=2 * width,
            latents=torch.from_numpy(noise)[None],
            output_type="np",
        ).images[0]
    assert np.abs(ours / 255 - theirs).max() <= 1.01 / 255


@pytest.fixture(scope="module")
def quantised(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[SpecFile, Path]:
    """(W8A8 spec, its bundle: a copy, whose files onnx reads)."""
    spec_file, bundle = made.quantised(lambda sample, timestep: predict(made, sample, timestep))
    place = tmp_path_factory.mktemp("quantised") / bundle.name
    return spec_file, shutil.copytree(bundle, place, copy_function=shutil.copyfile)


def test_both_lowerings_of_every_family_hold_the_same_integers_and_the_lint_is_silent(
    quantised: tuple[SpecFile, Path],
) -> None:
    spec_file, bundle = quantised
    stored = []
    for name in ("ort", "trt"):
        graph = onnx.load(bundle / f"unet.{name}.onnx").graph
        stored.append({one.name: numpy_helper.to_array(one) for one in graph.initializer})
    layers = [name for name, layer in spec_file.spec.layers.items() if layer.weight == "int8"]
    assert len(layers) == len(spec_file.spec.layers) - 2
    for name in layers:
        first, second = (one[f"{name}.weight"] for one in stored)
        assert first.dtype == second.dtype == np.int8 and np.array_equal(first, second), name
    assert lint_trt(bundle / "unet.trt.onnx") == []


@pytest.mark.parametrize(("height", "width"), [(9, 7), (5, 12)])
def test_both_lowerings_draw_odd_sizes_as_near_to_torch_as_even_ones(
    made: Made, quantised: tuple[SpecFile, Path], height: int, width: int
) -> None:
    """In integers, and the TensorRT graph, float16 around the same integers, on ONNX Runtime's CPU kernels."""
    pipeline = Pipeline(OrtEngine(quantised[1], threads=1))
    told = pipeline.rows(PROMPT).conditioning
    errors = {}
    for h, w in ((8, 8), (height, width)):
        sample = np.random.default_rng(1).standard_normal((1, 4, h, w)).astype(np.float32)
        wanted = predict(made, sample, 321.0)
        whole = {"sample": sample, "timestep": np.float32([321.0]), **unet_feed(pipeline.manifest, told, h, w)}
        session = ort.InferenceSession(str(quantised[1] / GRAPH), providers=["CPUExecutionProvider"])
        found = pipeline.engine.denoiser(told, h, w)(sample, 321.0), session.run(None, whole)[0]
        errors[h, w] = [np.linalg.norm(one - wanted) / np.linalg.norm(wanted) for one in found]
    assert all(odd <= 1.5 * even for odd, even in zip(errors[height, width], errors[8, 8], strict=True)), errors


def test_onnx_runtime_computes_every_layer_of_every_family_as_the_spec_says(
    made: Made, quantised: tuple[SpecFile, Path], tmp_path: Path
) -> None:
    """Layer by layer, cut out of the bundle's graph, from equal inputs: in a whole UNet, values on a rounding edge fall
    to either side and are followed by others, so that two exact computations drift apart like two draws of that noise."""
    spec_file, bundle = quantised
    graph, random = onnx.load(bundle / "unet.ort.onnx"), np.random.default_rng(3)
    for name in (name for name, layer in spec_file.spec.layers.items() if layer.weight == "int8"):
        module = copy.deepcopy(made.pipe.unet.get_submodule(name))
        is_conv = spec_file.spec.layers[name].op == "conv"
        if not is_conv:
            module.bias = None  # added by a node of its own
        shape = (1, module.in_channels, 8, 8) if is_conv else (1, 5, module.in_features)
        x = random.standard_normal(shape).astype(np.float32) * 40 * float(spec_file.tensors[f"{name}.input_scale"])
        with torch.no_grad():
            wanted = SpecLayer(name, module, spec_file)(torch.from_numpy(x)).numpy()
        found = run(layer_graph(graph, name, is_conv), x, tmp_path / "layer.onnx")
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error <= 5e-3, f"{name}: {error}"
        step = float(spec_file.tensors[f"{name}.output_scale"]) if is_conv else 1e-4 * float(np.abs(wanted).max())
        assert np.abs(found - wanted).max() <= 1.001 * step, name


def layer_graph(model: onnx.ModelProto, name: str, is_conv: bool) -> onnx.ModelProto:
    """One layer with the Q/DQ around it, from float to float."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    read_by = {value: node for node in model.graph.node for value in node.input}
    weight = read_by[f"{name}.weight"]
    product = read_by[weight.output[0]]
    given = made_by[product.input[0]]
    first = made_by[given.input[0]]
    nodes = [first, given, weight, product]
    while is_conv and nodes[-1].op_type != "DequantizeLinear":
        nodes.append(read_by[nodes[-1].output[0]])
    wanted = {value for node in nodes for value in node.input}
    ends = [onnx.helper.make_tensor_value_info(v, 1, None) for v in (first.input[0], nodes[-1].output[0])]
    constants = [one for one in model.graph.initializer if one.name in wanted]
    graph = onnx.helper.make_graph(nodes, "layer", ends[:1], ends[1:], constants)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def run(model: onnx.ModelProto, x: np.ndarray, file: Path) -> np.ndarray:
    """As the runtime opens it: with kernels that do not saturate."""
    onnx.save(model, file)
    session = open_session(file, 1)
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.trt
@pytest.mark.parametrize("sides", [(0, 0), (18, 14)], ids=["the base's size", "odd latents"])
def test_every_family_compiles_to_what_the_spec_says(quantised: tuple[SpecFile, Path], sides: tuple[int, int]) -> None:
    spec_file, bundle = quantised
    height, width = ((side, side, side) for side in sides)
    require_compiles(bundle / GRAPH, graph_shapes(bundle, BuildSettings(height=height, width=width)), spec_file)


def test_refit_is_tried_on_every_input_that_an_architecture_has(made: Made) -> None:
    """SDXL's plan takes two more inputs; the feed of the A -> B -> A check runs through the graph as it is."""
    feed = sample_feed(graph_shapes(made.bundle, BuildSettings(refit=True)))
    session = ort.InferenceSession(str(made.bundle / GRAPH), providers=["CPUExecutionProvider"])
    assert set(feed) == {value.name for value in session.get_inputs()}
    assert np.isfinite(session.run(None, dict(feed))[0]).all()


@pytest.mark.parametrize("made", ["sd1"], indirect=True)  # the only second trace of a test run; sdxl was equal too
def test_another_checkpoint_of_the_stored_family_is_byte_identical_to_a_fresh_trace(made: Made, tmp_path: Path) -> None:
    """'max' is exported, W8A8, through the family that 'rex' traced, then again where no family is stored."""
    assert made.bundle
    fresh = Repository.open(tmp_path, create=True)
    for room in ("bases", "checkpoints"):
        shutil.copytree(made.repository.root / room, tmp_path / room, dirs_exist_ok=True)
    bundles = []
    for repository in (made.repository, fresh):
        plain = made.plain("max", repository)
        spec = eight_bits(plain, made.pipe.unet, dict.fromkeys(plain.spec.layers, (4.0, 4.0)))
        bundles.append(made.export("max", repository, spec))
    through_stored, again = bundles
    names = sorted(file.name for file in through_stored.iterdir())
    assert names == sorted(file.name for file in again.iterdir())
    assert [n for n in names if (through_stored / n).read_bytes() != (again / n).read_bytes()] == []


@pytest.mark.parametrize("made", ["sd1"], indirect=True)
def test_an_unknown_reference_is_refused(made: Made) -> None:
    family = open_family(made.repository.root / "families", made.repository.root / "bases" / "tiny")
    with pytest.raises(
        SpecError, match="spec: must be one of fp32, fp16 or a file, got 'fp8'; calibrate the checkpoint"
    ):
        unquantised_spec(family, "rex", "0", "fp8")


REFUSALS = {
    "inpainting": ({"in_channels": 9}, "unet in_channels must be 4, got 9; inpainting, depth and upscaling UNets"),
    "lcm": ({"time_cond_proj_dim": 256}, "unet time_cond_proj_dim must be None, got 256; guidance-distilled UNets"),
    "classes": ({"class_embed_type": "timestep"}, "unet class_embed_type must be None, got 'timestep'; only Stable"),
    "image": ({"addition_embed_type": "image"}, "addition_embed_type must be None or text_time, got 'image'"),
    "blocks": (
        {"down_block_types": ["SimpleCrossAttnDownBlock2D"]},
        "unet blocks must be of DownBlock2D, CrossAttnDownBlock2D, UpBlock2D, CrossAttnUpBlock2D, got 'Simple",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_would_be_silently_wrong_is_refused(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RepositoryError, match=message):
        read_configs(edited(tiny_base, tmp_path, "unet", changes))


def test_a_vae_with_latent_statistics_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="vae latents_mean must be absent, got values"):
        read_configs(edited(tiny_base, tmp_path, "vae", {"latents_mean": [0.0] * 4}))


def test_an_sdxl_refiner_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    base = edited(tiny_base, tmp_path, "unet", {**added, "projection_class_embeddings_input_dim": 20 + 5 * 8})
    (base / "text_encoder_2").mkdir()
    (base / "text_encoder_2" / "config.json").write_text('{"projection_dim": 20}')
    wanted = r"must be 68 \(pooled text and six time ids\), got 60; SDXL refiners are not supported"
    with pytest.raises(RepositoryError, match=wanted):
        read_configs(base)


def edited(base: Path, folder: Path, component: str, changes: dict[str, Any]) -> Path:
    """Copies of a base's configs, one of them changed."""
    for name in ("unet", "text_encoder", "vae"):
        config = json.loads((base / name / "config.json").read_text())
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config | (changes if name == component else {})))
    return folder
