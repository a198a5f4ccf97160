"""The TensorRT engine around its plan: every input of every family is bound, and steps equal ONNX Runtime's on the graph.

No GPU: the plan and CUDA are stand-ins that compute (gpu_stand_in). What TensorRT itself does is not shown here.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.errors import EngineError
from personalq.repository.engines import keep_engine
from runtime.drawing.pipeline import Pipeline
from runtime.engines.engine import unet_file, unet_inputs
from runtime.engines.ort import OrtEngine
from runtime.engines.tensorrt import TensorRtEngine
from tests.runtime.gpu_stand_in import HostCuda, HostPlan, stand_in

PARTS = {"target": "tensorrt", "device": "sm89", "version": "11.4.0"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[HostCuda, list[HostPlan]]:
    return stand_in(monkeypatch)


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, traces: Path) -> Path:
    pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
    from tests.exporters.families import Made

    folder: Path = Made(request.param, tmp_path_factory.mktemp(request.param), traces).bundle
    return folder


def plan_of(bundle: Path, **parts: str) -> TensorRtEngine:
    """The bundle with a plan built for these parts, opened."""
    graph = bundle / unet_file(OrtEngine(bundle, threads=1).manifest)
    keep_engine(bundle, {**PARTS, **parts}, "unet.plan", str(graph).encode())
    return TensorRtEngine(bundle, threads=1)


def test_every_input_of_the_unet_is_bound_and_steps_equal_onnx_runtime(exported: Path, gpu: Any) -> None:
    host, plans = gpu
    engine, plain = plan_of(exported), OrtEngine(exported, threads=1)
    conditioning = Pipeline(plain).rows("a red mug").conditioning
    ours, theirs = (one.denoiser(conditioning, 8, 12) for one in (engine, plain))
    assert set(plans[0].shapes) == {"sample", "timestep", *unet_inputs(engine.manifest)}
    assert ("time_ids" in plans[0].shapes) == bool(engine.manifest.graphs.text_encoder_2)
    random = np.random.default_rng(0)
    for timestep in (900.0, 500.0, 100.0, 20.0):
        sample = random.standard_normal((1, 4, 8, 12)).astype(np.float32)
        assert np.array_equal(ours(sample, timestep), theirs(sample, timestep))
    assert host.launches == 3  # the first step runs as it is, later ones as one CUDA graph


def test_a_picture_of_a_guided_pair_equals_onnx_runtimes(exported: Path, gpu: Any) -> None:
    ours, theirs = Pipeline(plan_of(exported)), Pipeline(OrtEngine(exported, threads=1))
    pictures = [one.image("a red mug", negative_prompt="blue", steps=3, guidance=4.0) for one in (ours, theirs)]
    assert np.array_equal(*pictures)


def test_a_batch_outside_the_plans_profile_is_refused_by_name(exported: Path, gpu: Any) -> None:
    engine = plan_of(exported, **{"shape.sample": "2x4x8x12/2x4x8x12/2x4x8x12"})
    conditioning = Pipeline(OrtEngine(exported, threads=1)).rows("a red mug").conditioning
    with pytest.raises(EngineError, match=r"^sample: must be within 2x4x8x12 and 2x4x8x12"):
        engine.denoiser(conditioning, 8, 12)


def test_an_input_that_the_plan_lacks_is_one_line(exported: Path, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = plan_of(exported)
    conditioning = Pipeline(OrtEngine(exported, threads=1)).rows("a red mug").conditioning
    monkeypatch.setattr("runtime.engines.tensorrt.unet_feed", lambda *_: dict(list(conditioning.items())[1:]))
    lacking = unet_inputs(engine.manifest)[0]
    with pytest.raises(EngineError, match=f"^plan: must know the shapes of all inputs, got none for {lacking}"):
        engine.denoiser(conditioning, 8, 12)
