"""TensorRT plans: what can be chosen, what is in a plan's key, how an engine is held against its spec; on a GPU, the build."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from exporters.graphs.census import LayerKind
from exporters.lint.rules import ERRORS, WARNINGS
from exporters.targets.engine_layers import from_aot, from_inspector, mismatches, table
from exporters.targets.refit import find_donor, sample_feed
from exporters.targets.settings import READERS, BuildSettings, input_shapes, read_settings
from exporters.targets.tensorrt import GRAPH, build_plan, compute_capability, plan_parts, with_other_inputs
from personalq.bundle import read_manifest
from personalq.errors import EngineError
from personalq.repository.engines import check_engine, engine_key, keep_engine

INT8, FLOAT = LayerKind("linear", "int8", "int8"), LayerKind("conv", "float", "float")
WOQ = LayerKind("linear", "int4", "float")


@pytest.fixture(scope="module")
def manifest(exported):
    return read_manifest(exported[1]["taq"].bundle)


def test_shapes_are_static_at_the_bases_own_size_unless_a_range_is_given(manifest):
    static = input_shapes(manifest, BuildSettings())
    assert static["sample"] == ((2, 4, 8, 8),) * 3
    assert static["row_index"] == ((2, 77),) * 3
    assert static["kept"][0] == (2, 8, manifest.rows.width)
    ranged = input_shapes(manifest, read_settings(["batch=1:2:4", "height=16:16:32", "width=24"]))
    assert ranged["sample"] == ((1, 4, 8, 12), (2, 4, 8, 12), (4, 4, 16, 12))
    assert ranged["rest_scale"][2] == (4, 77, 2 * len(manifest.rows.layers))


def test_inputs_that_only_some_architectures_have_are_in_the_profile_too():
    def model(*shape):
        value = ir.Value(name="text_embeds", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        fixed = ir.Value(name="timestep", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1,)))
        return ir.Model(ir.Graph([value, fixed], [], nodes=[], opset_imports={"": 21}), ir_version=10)

    settings, known = read_settings(["batch=1:2:4"]), {"sample": ((1,), (2,), (4,))}
    found = with_other_inputs(known, model("batch", 20), settings)
    assert found == known | {"text_embeds": ((1, 20), (2, 20), (4, 20))}
    with pytest.raises(EngineError, match="text_embeds: must be open in its batch only"):
        with_other_inputs(known, model("batch", "width"), settings)


def test_an_unquantised_bundle_takes_rows_whole(exported):
    shapes = input_shapes(read_manifest(exported[1]["fp32"].bundle), BuildSettings())
    assert set(shapes) == {"sample", "rows"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hight=3", r"--set hight=3: key must be one of batch, .*, got 'hight'; correct it"),
        ("batch=4:2:1", r"--set batch: must be a number or min:opt:max, got '4:2:1'; correct it"),
        ("batch=0", r"--set batch: must be a number or min:opt:max, got '0'"),
        ("level=6", r"--set level: must be a number from 0 to 5, got '6'"),
        ("workspace_mb=-1", r"--set workspace_mb: must be a number of megabytes, got '-1'"),
        ("strip=true", r"--set strip: must be yes or no, got 'true'"),
        ("hardware=ada", r"--set hardware: must be one of none, ampere_plus, same_compute_capability, got 'ada'"),
        ("architectures=sm90", r"--set architectures: must be a list of sm75, .*, got 'sm90'"),
        ("exclude_lean_runtime=yes", r"--set exclude_lean_runtime: needs version_compatible=yes, got no"),
    ],
)
def test_a_wrong_setting_is_one_line(text, message):
    with pytest.raises(EngineError, match=message):
        read_settings([text])


def test_a_size_the_latents_cannot_have_is_refused(manifest):
    with pytest.raises(EngineError, match=r"--set height: must be a multiple of 2 pixels, got 15; round it"):
        input_shapes(manifest, read_settings(["height=15"]))


def test_a_plans_key_holds_graph_weights_device_version_shapes_and_settings(manifest):
    settings = BuildSettings()
    parts = plan_parts(manifest, "tensorrt-rtx", settings, "1.7.1")
    assert parts["device"] == "sm86,sm89,sm120" and parts["version"] == "1.7.1"
    assert parts[GRAPH] == manifest.files[GRAPH].sha256
    assert parts["shape.sample"] == "2x4x8x8/2x4x8x8/2x4x8x8"
    assert parts["set.level"] == "3" and parts["set.refit"] == "no"
    other = [replace(settings, level=5), replace(settings, batch=(1, 1, 1)), replace(settings, architectures=("sm89",))]
    keys = {engine_key(plan_parts(manifest, "tensorrt-rtx", one, "1.7.1")) for one in [settings, *other]}
    keys.add(engine_key(plan_parts(manifest, "tensorrt-rtx", settings, "1.8.0")))
    assert len(keys) == 5


def test_without_a_gpu_tensorrt_says_where_to_build(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        EngineError, match="needs an NVIDIA GPU to build on, got none; build on the machine that serves"
    ):
        compute_capability()


def test_a_refit_donor_differs_in_its_weights_only(exported, tmp_path):
    first, second = tmp_path / "bundles" / "a", tmp_path / "bundles" / "b"
    shutil.copytree(exported[1]["fp32"].bundle, first)
    second.mkdir()
    parts = plan_parts(read_manifest(first), "tensorrt-rtx", BuildSettings(refit=True), "1.7.1")
    kept = keep_engine(first, parts, "unet.plan", b"plan", {"layers.json": b"{}"})
    assert (kept.path.parent / "layers.json").read_bytes() == b"{}"
    check_engine(kept)
    assert find_donor(second, parts | {GRAPH: "another", "weights.data": "another"}) == kept
    assert find_donor(second, parts | {"version": "1.8.0"}) is None


def test_refit_is_tried_on_inputs_of_the_plans_shapes(exported):
    shapes = input_shapes(read_manifest(exported[1]["fp32"].bundle), BuildSettings())
    feed = sample_feed(shapes)
    assert feed["sample"].shape == (2, 4, 8, 8) and feed["timestep"].shape == (1,)
    np.testing.assert_array_equal(feed["rows"], sample_feed(shapes)["rows"])


# As TensorRT 10 and 11 write it with detailed profiling; recorded by hand from published reports.
INSPECTOR = {
    "Layers": [
        {
            "Name": "q+k",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Dimensions": [2, 64], "Format/Datatype": "Int8"}],
            "Outputs": [{"Name": "y", "Dimensions": [2, 64], "Format/Datatype": "Half"}],
            "Metadata": "[ONNX Layer: to_q]\x1e[ONNX Layer: to_k]",
        },
        {
            "Name": "conv",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
            "Outputs": [],
            "Weights": {"Type": "Half", "Count": 9},
            "Metadata": "[ONNX Layer: conv_in]",
        },
        {
            "Name": "woq",
            "LayerType": "runtime_fusion",
            "Inputs": [{"Name": "x", "Format/Datatype": "Half"}],
            "Outputs": [],
            "Constants": [{"Name": "w", "Format/Datatype": "Int4"}],
            "Metadata": "[ONNX Layer: ff.net.2]",
        },
    ],
    "Bindings": [],
}


def test_an_inspectors_layers_are_held_against_the_spec():
    layers = from_inspector(json.dumps(INSPECTOR))
    wanted = {"to_q": INT8, "to_k": INT8, "conv_in": FLOAT, "ff.net.2": WOQ}
    assert mismatches(layers, wanted) == []
    assert table(layers, wanted) == {
        "conv float/float -> float": 1,
        "linear int4/float -> float over int4": 1,
        "linear int8/int8 -> int8": 2,
    }


def test_a_layer_that_runs_in_float_or_is_missing_is_named():
    layers = from_inspector(json.dumps(INSPECTOR))
    wanted = {"conv_in": LayerKind("conv", "int8", "int8"), "to_v": INT8}
    assert mismatches(layers, wanted) == [
        "conv_in: must run in int8 as the spec says (conv int8/int8), got float",
        "to_v: must run in int8 as the spec says (linear int8/int8), got not found",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"engine inspector: must give JSON with Layers, got '\{\}'; build again"),
        ('{"Layers": ["conv_in"]}', "engine inspector: layers must be detailed, got bare names"),
    ],
)
def test_an_inspector_that_says_too_little_is_one_line(text, message):
    with pytest.raises(EngineError, match=message):
        from_inspector(text)


def test_a_report_without_an_engine_is_one_line():
    with pytest.raises(EngineError, match="engine report: must hold a built engine, got result 'parse refused'"):
        from_aot({"result": "parse refused"})


DOCS = Path(__file__).parents[3] / "docs" / "tensorrt.md"


def test_the_docs_name_every_setting_and_every_rule():
    named = set(re.findall(r"`([a-z0-9_-]+)`", DOCS.read_text()))
    assert set(READERS) <= named
    assert {*ERRORS, *WARNINGS, "hardware-type"} <= named


def test_every_export_command_in_the_docs_is_understood():
    from cli import cli

    lines = [line.split() for line in DOCS.read_text().splitlines() if line.startswith("personalq export ")]
    assert len(lines) == 5
    for words in lines:
        context = cli.commands["export"].make_context("export", words[2:])
        read_settings(context.params["settings"])


def _on_a_gpu() -> None:
    pytest.importorskip("tensorrt", reason="tensorrt is not installed: pip install 'personalq[tensorrt]'")
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'personalq[tensorrt]'")
    if shutil.which("nvidia-smi") is None:
        pytest.skip("no NVIDIA GPU: nvidia-smi is not there")


@pytest.mark.gpu
@pytest.mark.trt
def test_a_plan_is_built_keeps_the_census_runs_and_is_used_again(exported, tmp_path):
    _on_a_gpu()
    from polygraphy.backend.trt import TrtRunner, engine_from_bytes

    bundle = tmp_path / "bundles" / "a"
    shutil.copytree(exported[1]["taq"].bundle, bundle)
    built = build_plan(bundle, tmp_path / "timing", "tensorrt", BuildSettings())
    assert built.mismatches == () and not built.reused
    assert list((tmp_path / "timing").glob("*.timing"))
    assert build_plan(bundle, tmp_path / "timing", "tensorrt", BuildSettings()).reused
    session = ort.InferenceSession(str(bundle / GRAPH), providers=["CPUExecutionProvider"])
    feed = _feed(bundle)
    expected = session.run(None, feed)[0]
    with TrtRunner(engine_from_bytes(Path(built.engine.path).read_bytes())) as runner:
        found = runner.infer(feed)["noise_pred"]
    noise = float(((expected - found) ** 2).sum())
    assert 10 * np.log10(float((expected**2).sum()) / noise) > 25


def _feed(bundle: Path) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {name: three[1] for name, three in input_shapes(read_manifest(bundle), BuildSettings()).items()}
    return {
        "sample": random.standard_normal(shapes["sample"]).astype(np.float32),
        "timestep": np.array([500.0], np.float32),
        "rest": random.integers(-127, 128, shapes["rest"]).astype(np.int8),
        "rest_scale": np.full(shapes["rest_scale"], 0.01, np.float32),
        "kept": random.standard_normal(shapes["kept"]).astype(np.float16),
        "row_index": np.tile(np.arange(77, dtype=np.int64), (2, 1)),
    }
