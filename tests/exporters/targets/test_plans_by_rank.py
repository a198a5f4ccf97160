"""A base's plans: which are built, of which graph and under which key. No builder: what it is given is recorded."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporters.request import base_request, export_request
from exporters.targets import tensorrt
from exporters.targets.settings import BuildSettings, of_merged, read_settings
from exporters.targets.tensorrt import GRAPH, build_plan, plan_parts, ranks_of
from personalq.bundle import Manifest, read_manifest
from personalq.errors import EngineError
from personalq.repository import Repository
from personalq.repository.engines import engine_key, engines_of, read_engine

RANK16, RANK64 = "unet.trt_rank16.onnx", "unet.trt_rank64.onnx"
Built = list[tuple[str, tensorrt.Shapes]]


@pytest.fixture
def repository(exported: Any, tmp_path: Path) -> Repository:
    return Repository.open(Path(shutil.copytree(exported[0].root, tmp_path / "repository")))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    """(graph, shapes) of every plan that a builder was asked for."""
    found: Built = []

    def build(trt: Any, graph: Path, shapes: tensorrt.Shapes, *_: Any) -> bytes:
        found.append((graph.name, shapes))
        return graph.name.encode()

    monkeypatch.setattr(tensorrt, "_build", build)
    monkeypatch.setattr(tensorrt, "compute_capability", lambda: "sm89")
    monkeypatch.setattr(
        tensorrt, "inspect", lambda trt, plan, graph: ((f"{graph.name}: read back",), b'{"mismatches": []}')
    )
    for room in ("exporters.request", "exporters.targets.tensorrt"):
        monkeypatch.setattr(f"{room}.require", lambda target: SimpleNamespace(__version__="11.4.0"))
    return found


def plans(bundle: Path) -> dict[str, str]:
    """Key -> the graph that it was built of."""
    return {kept.manifest.key: kept.path.read_text() for kept in engines_of(bundle, "tensorrt")}


def test_a_base_gets_plans_of_rank_0_and_16_which_the_result_lists(
    repository: Repository, built: Built, caplog: pytest.LogCaptureFixture
) -> None:
    made = base_request(repository, "tiny", Path("fp16"), ["tensorrt"])
    assert [graph for graph, _ in built] == [GRAPH, RANK16]
    kept = plans(made.bundle)
    assert made.engines == ("onnxruntime", *sorted(kept, key=lambda key: kept[key] != GRAPH)) and len(kept) == 2
    assert f"tensorrt: {GRAPH}: read back" in caplog.text
    assert f"tensorrt of rank 16: {RANK16}: read back" in caplog.text

    again = base_request(repository, "tiny", Path("fp16"), ["tensorrt"], settings=["rank=64,0,16"])
    assert [graph for graph, _ in built] == [GRAPH, RANK16, RANK64]  # the others are there
    assert again.engines[:3] == made.engines and plans(made.bundle)[again.engines[3]] == RANK64
    parts = [read_engine(made.bundle / "engines" / key).manifest.parts for key in again.engines[1:]]
    assert [one.get("set.rank") for one in parts] == [None, "16", "64"]
    sha256 = read_manifest(made.bundle).files
    assert [one[graph] for one, graph in zip(parts, (GRAPH, RANK16, RANK64), strict=True)] == [
        sha256[graph].sha256 for graph in (GRAPH, RANK16, RANK64)
    ]


def test_a_plan_for_adapters_takes_one_for_each_row_of_the_batch(repository: Repository, built: Built) -> None:
    bundle = base_request(repository, "tiny", Path("fp32"), []).bundle
    inputs = read_manifest(bundle).adapters
    assert built == [] and inputs is not None
    settings = read_settings(["batch=1:2:4"])
    build_plan(bundle, repository.root, "tensorrt", settings, rank=16)
    ((graph, shapes),) = built
    assert graph == RANK16 and shapes["adapter_strength"] == ((1,), (2,), (4,))
    for name, place in inputs.branches["unet"].items():
        n, k = place.weight[:2]
        if place.is_wide:
            assert f"{name}.down" not in shapes
            continue
        down, up = ((k, 16), (16, n)) if place.op == "linear" else ((16, k), (n, 16))
        assert shapes[f"{name}.down"] == tuple((one, *down) for one in (1, 2, 4))
        assert shapes[f"{name}.up"] == tuple((one, *up) for one in (1, 2, 4))
    parts = plan_parts(read_manifest(bundle), "tensorrt", settings, "11.4.0", 16)
    assert parts["shape.adapter_strength"] == "1/2/4" and ranks_of(bundle, settings) == (0, 16)
    assert ranks_of(bundle, replace(settings, refit=True)) == (0,)  # adapters are inputs: nothing to refit


def test_keys_differ_by_rank_and_that_of_rank_0_is_a_merged_plans(exported: Any) -> None:
    merged = read_manifest(exported[1]["taq"].bundle)
    base = with_ranks(merged)
    keys = [engine_key(plan_parts(base, "tensorrt-rtx", BuildSettings(), "1.7.1", rank)) for rank in (0, 16, 64)]
    assert len(set(keys)) == 3
    for settings in (BuildSettings(), BuildSettings(rank=(0, 16)), of_merged(BuildSettings())):
        parts = plan_parts(merged, "tensorrt-rtx", settings, "1.7.1")
        assert engine_key(parts) == keys[0]
        assert not any("rank" in name for name in parts) and "shape.adapter_strength" not in parts


def with_ranks(manifest: Manifest) -> Manifest:
    """As if the bundle had graphs that take adapters."""
    unet = {**manifest.graphs.unet, "trt_rank16": RANK16, "trt_rank64": RANK64}
    files = {**manifest.files, RANK16: manifest.files[GRAPH], RANK64: manifest.files[GRAPH]}
    return manifest.model_copy(update={"graphs": manifest.graphs.model_copy(update={"unet": unet}), "files": files})


def test_a_bundle_without_the_graph_says_so(exported: Any) -> None:
    with pytest.raises(EngineError) as error:
        plan_parts(read_manifest(exported[1]["taq"].bundle), "tensorrt-rtx", BuildSettings(), "1.7.1", 16)
    told = "must hold a graph for TensorRT that takes adapters of rank 16, got none; export it again"
    assert str(error.value).endswith(told)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rank=8"], "--set rank: must be a list of 0, 16, 64, got '8'; correct it"),
        (["rank="], "--set rank: must be a list of 0, 16, 64, got ''; correct it"),
        (["rank=0,16", "refit=yes"], "--set refit: must be used with rank=0, got rank=0,16: an adapter is an input"),
    ],
)
def test_a_rank_that_cannot_be_built_is_one_line(settings: list[str], message: str) -> None:
    with pytest.raises(EngineError) as error:
        read_settings(settings)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_ranks_of_a_merged_bundle_are_refused_before_anything_is_written_or_said(
    repository: Repository, built: Built, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"^--set rank: must hold 0 for a merged bundle, .* got 16,64; add 0$"):
        export_request(Repository(tmp_path / "none"), "rex", None, ["tensorrt"], settings=["rank=16,64"])
    assert not (tmp_path / "none").exists()
    made = export_request(repository, "rex", Path("fp32"), ["tensorrt"], settings=["rank=0,16"])
    assert [graph for graph, _ in built] == [GRAPH] and len(made.engines) == 2
    assert "rex: its bundle takes no adapters, so the plan of rank 0 alone is built" in caplog.text
