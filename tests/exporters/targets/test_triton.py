"""A Triton model repository: configs that Triton's own types parse, graphs that compute the same as Triton will load them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from cli import cli
from exporters.targets.triton import model_name, sample_feed, write_optimised, write_triton
from exporters.targets.triton_config import parse_config, ports_of
from personalq.bundle import read_manifest
from personalq.errors import BundleError, ParityError, RepositoryError
from personalq.repository.engines import keep_engine

INTEGER = {"QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"}
PARTS = ("text_encoder", "text_rows", "unet", "vae_decoder")


@pytest.fixture(scope="module")
def written(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(bundle, model repository) of the quantised rex."""
    place = tmp_path_factory.mktemp("triton") / "models"
    bundle = exported[1]["taq"].bundle
    assert write_triton(bundle, place) == [f"rex-{part}" for part in PARTS]
    return bundle, place


def session(file: Path, *, optimised: bool = True) -> Any:
    """Opened as Triton's ONNX Runtime backend does: with every optimiser, or with none (graph level 2)."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("part", PARTS)
def test_each_config_is_tritons_and_says_what_the_graph_says(written: tuple[Path, Path], part: str) -> None:
    folder = written[1] / f"rex-{part}"
    config = parse_config((folder / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == (folder.name, "onnxruntime", 0)
    opened = session(folder / "1" / config.default_model_filename, optimised=part != "unet")
    for told, real in ((config.input, opened.get_inputs()), (config.output, opened.get_outputs())):
        assert [port.name for port in told] == [value.name for value in real]
        for port, value in zip(told, real, strict=True):
            assert list(port.dims) == [side if isinstance(side, int) else -1 for side in value.shape]
    tags = dict(config.metric_tags)
    assert tags == {"checkpoint": "rex", "bundle": written[0].name[:12], "spec": "taq-w8a8"}


def test_the_quantised_unet_runs_on_integer_kernels_and_computes_the_same_without_optimisers(
    written: tuple[Path, Path],
) -> None:
    bundle, place = written
    config = parse_config((place / "rex-unet" / "config.pbtxt").read_text())
    assert config.optimization.graph.level == 2 and config.instance_group[0].kind == 2  # KIND_CPU
    file = place / "rex-unet" / "1" / "model.onnx"
    kinds = [node.op_type for node in onnx.load(file, load_external_data=False).graph.node]
    quantised = sum(n for kind, n in read_manifest(bundle).census.items() if "int8/int8" in kind)
    assert sum(kind in INTEGER for kind in kinds) == quantised > 0

    from runtime.engines.sessions import open_session

    ours, triton = open_session(bundle / "unet.ort.onnx", None), session(file, optimised=False)
    feed = sample_feed(triton, (8, 8))
    wanted, found = ours.run(None, feed)[0], triton.run(None, feed)[0]
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.9999


def test_a_reference_bundle_is_linked_as_it_is(exported: Any, tmp_path: Path) -> None:
    bundle = shutil.copytree(exported[1]["fp32"].bundle, tmp_path / "bundle")
    write_triton(bundle, tmp_path / "models")
    unet = tmp_path / "models" / "rex-unet"
    assert (unet / "1" / "weights.data").samefile(bundle / "weights.data")
    config = parse_config((unet / "config.pbtxt").read_text())
    assert [port.name for port in config.input] == ["sample", "timestep", "rows"]
    assert config.instance_group[0].kind == 0 and not config.HasField("optimization")
    assert session(unet / "1" / "model.onnx").get_outputs()[0].name == "noise_pred"


def test_a_plan_takes_the_unets_place_with_the_sides_it_was_built_for(exported: Any, tmp_path: Path) -> None:
    bundle = shutil.copytree(exported[1]["taq"].bundle, tmp_path / "bundle")
    shapes = {"sample": "2x4x8x8/2x4x8x8/4x4x8x16", "rest": "2x77x512/2x77x512/4x77x512"}
    parts = {"target": "tensorrt", "device": "sm89", "version": "10.12"}
    keep_engine(bundle, parts | {f"shape.{name}": text for name, text in shapes.items()}, "unet.plan", b"plan")
    keep_engine(bundle, parts | {"set.rank": "16"}, "unet.plan", b"newer, of a graph with other inputs")
    write_triton(bundle, tmp_path / "models")
    unet = tmp_path / "models" / "rex-unet"
    config = parse_config((unet / "config.pbtxt").read_text())
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert config.instance_group[0].kind == 1  # KIND_GPU
    dims = {port.name: list(port.dims) for port in [*config.input, *config.output]}
    assert dims["sample"] == dims["noise_pred"] == [-1, 4, 8, -1] and dims["rest"] == [-1, 77, 512]
    assert [file.name for file in (unet / "1").iterdir()] == ["model.plan"]
    assert (unet / "1" / "model.plan").read_bytes() == b"plan"


def test_the_command_writes_models_and_replaces_them_whole(exported: Any, tmp_path: Path) -> None:
    repository, results = exported
    spec = next(path for path in (repository.root / "specs" / "rex").glob("taq-*.json"))
    old = tmp_path / "models" / "rex-unet"
    old.mkdir(parents=True)
    (old / "stale").write_text("")
    arguments = ["export", "rex", "--spec", str(spec), "--triton", str(tmp_path / "models"), "--json"]
    ran = CliRunner().invoke(cli, ["--repo", str(repository.root), *arguments])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["triton"] == [f"rex-{part}" for part in PARTS]
    assert not (old / "stale").exists() and sorted(p.name for p in old.iterdir()) == ["1", "config.pbtxt"]
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == [f"rex-{part}" for part in PARTS]
    assert results["taq"].bundle.is_dir()


def test_a_place_that_cannot_be_written_is_one_line(exported: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RepositoryError, match=r"file/models: must be writable, got 'Not a directory'"):
        write_triton(exported[1]["taq"].bundle, tmp_path / "file" / "models")


def test_a_graph_that_computes_something_else_after_optimising_is_refused(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    real = ort.InferenceSession

    class Drifting(real):
        def run(self, *given: Any, **more: Any) -> Any:
            found = super().run(*given, **more)
            return [found[0] * 1.01] if "disabled_optimizers" not in self.told else found

        def __init__(self, *given: Any, **more: Any) -> None:
            self.told = more
            super().__init__(*given, **more)

    monkeypatch.setattr(ort, "InferenceSession", Drifting)
    bundle = exported[1]["taq"].bundle
    with pytest.raises(ParityError, match=r"^unet\.ort\.onnx: the optimised graph must predict the same, got a differ"):
        write_optimised(bundle / "unet.ort.onnx", tmp_path, read_manifest(bundle))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nmae: 'x'", 'no field named "nmae"'),
        ("input { data_type: TYPE_FP7 }", "TYPE_FP7"),
        ("name: 3 {", "config.pbtxt"),
    ],
)
def test_what_triton_would_not_parse_is_refused_with_the_place(text: str, said: str) -> None:
    with pytest.raises(BundleError, match="must be Triton's ModelConfig, got") as caught:
        parse_config(text)
    assert said in str(caught.value)


def test_a_type_that_triton_is_not_told_is_refused() -> None:
    odd = ir.Value(name="x", type=ir.TensorType(ir.DataType.DOUBLE), shape=ir.Shape([1]))
    with pytest.raises(BundleError, match=r"^x: must be of type FLOAT, FLOAT16, INT8, INT64 with a shape, got DOUBLE"):
        ports_of([odd])


def test_names_are_plain_and_two_ids_never_share_one() -> None:
    assert model_name("biscuit-the-dog") == "biscuit-the-dog"
    assert model_name("me/dog") != model_name("me dog") != model_name("me-dog") == "me-dog"
    assert model_name("me/dog").startswith("me-dog-") and "/" not in model_name("../..")
