"""Flattened convolutions give the same bytes as those ONNX Runtime wrote; what cannot be flat stays as it is."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from personalq.repository.engines import ENGINES
from runtime.drawing.pipeline import Pipeline
from runtime.engines import sessions
from runtime.engines.flat_convs import flatten_convs
from runtime.engines.ort import OrtEngine
from runtime.engines.sessions import PREPARED, open_session
from tests.runtime.one_layer import write_layer

SHAPE = (2, 32, 9, 11)  # N, C, H, W


def prepared(folder: Path, kernel: tuple[int, int] = (3, 3), **attributes: Any) -> Path:
    """A convolution to 64 channels as ONNX Runtime optimised it."""
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (64, SHAPE[1] // attributes.get("group", 1), *kernel)).astype(np.int8)
    weight_scale, bias = random.uniform(0.001, 0.01, 64), random.standard_normal(64)
    layer = write_layer(folder / "conv.onnx", weight, weight_scale, (0.02, 0.05), bias, **attributes)
    open_session(layer, 1, save=folder / PREPARED)
    return folder / PREPARED


def outputs(graph: Path) -> Any:
    session = open_session(graph, 1, is_prepared=True)
    return [
        session.run(None, {"x": np.random.default_rng(1).standard_normal((n, SHAPE[1], h, w)).astype(np.float32)})[0]
        for n, h, w in ((2, 9, 11), (1, 4, 4), (1, 1, 1), (3, 8, 2))
    ]


@pytest.mark.parametrize(
    "told",
    [
        {"pads": [1, 1, 1, 1], "strides": [1, 1]},
        {"pads": [1, 1, 1, 1], "strides": [2, 2]},
        {"pads": [0, 1, 2, 3], "strides": [2, 1]},
        {"kernel": (1, 3), "pads": [0, 1, 0, 1], "strides": [1, 1]},
        {"kernel": (5, 3), "pads": [2, 1, 2, 1], "strides": [1, 2]},
    ],
    ids=str,
)
def test_a_flat_convolution_gives_the_same_bytes(tmp_path: Path, told: dict[str, Any]) -> None:
    graph = prepared(tmp_path, **told)
    before, size = outputs(graph), (tmp_path / "prepared.data").stat().st_size
    assert flatten_convs(graph) == 1
    made = onnx.load(graph, load_external_data=False)
    onnx.checker.check_model(graph)
    (node,) = (node for node in made.graph.node if node.op_type == "QLinearConv")
    (weight,) = (tensor for tensor in made.graph.initializer if tensor.name == node.input[3])
    height, width = told.get("kernel", (3, 3))
    assert list(weight.dims) == [64, 1, height, width * SHAPE[1]]
    assert (tmp_path / "prepared.data").stat().st_size == size
    after = outputs(graph)
    assert all(np.array_equal(one, two) for one, two in zip(before, after, strict=True))
    assert np.ptp(before[0]) > 1
    assert flatten_convs(graph) == 0  # it is flat already


@pytest.mark.parametrize(
    "told",
    [
        {"kernel": (1, 1), "pads": [0, 0, 0, 0], "strides": [1, 1]},
        {"pads": [1, 1, 1, 1], "strides": [1, 1], "group": 2},
        {"pads": [2, 2, 2, 2], "strides": [1, 1], "dilations": [2, 2]},
        {"pads": [1, 1, 1, 1]},
    ],
    ids=str,
)
def test_what_cannot_be_flat_is_left_alone(tmp_path: Path, told: dict[str, Any]) -> None:
    graph = prepared(tmp_path, **told)
    files = [graph, tmp_path / "prepared.data"]
    before = [file.read_bytes() for file in files]
    assert flatten_convs(graph) == 0
    assert [file.read_bytes() for file in files] == before


def test_a_unet_opened_again_draws_the_same_picture(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "has_int8_dot_product", lambda: False)
    bundle = shutil.copytree(exported[1]["taq"].bundle, tmp_path / "bundle")
    shutil.rmtree(bundle / ENGINES, ignore_errors=True)
    as_exported, as_prepared = [Pipeline(OrtEngine(bundle, 1)).image("sks dog", seed=1, steps=2) for _ in range(2)]
    assert np.array_equal(as_exported, as_prepared)
    graphs = [onnx.load(file, load_external_data=False).graph for file in (bundle / ENGINES).glob(f"*/{PREPARED}")]
    convs = [node for graph in graphs for node in graph.node if node.op_type == "QLinearConv"]
    kernels = [next(told.ints for told in node.attribute if told.name == "kernel_shape") for node in convs]
    assert sum(width > height for height, width in kernels) >= 10
