"""Which TensorRT plan fits a GPU and a version; and, where a GPU and TensorRT are, that a plan draws."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from personalq.errors import EngineError
from personalq.repository.engines import keep_engine
from runtime.engines import cuda
from runtime.engines import tensorrt as tensorrt_engine
from runtime.engines.plans import check_shapes, find_plan, misfit, rank_of

PARTS = {"target": "tensorrt", "device": "sm89", "version": "11.4.0", "set.hardware": "none", "set.strip": "no"}


@pytest.mark.parametrize(
    ("change", "device", "version", "expected"),
    [
        ({}, "sm89", "11.4.0", ""),
        ({}, "sm90", "11.4.0", "one for sm89"),
        ({}, "sm89", "11.3.0", "one of version 11.4.0"),
        ({"set.hardware": "ampere_plus"}, "sm90", "11.4.0", ""),
        ({"set.hardware": "ampere_plus"}, "sm75", "11.4.0", "one for sm89"),
        ({"set.version_compatible": "yes", "version": "10.16.1"}, "sm89", "11.4.0", ""),
        ({"set.version_compatible": "yes", "version": "12.0.0"}, "sm89", "11.4.0", "one of version 12.0.0"),
        ({"device": "sm86,sm89,sm120"}, "sm120", "11.4.0", ""),
        ({"set.strip": "yes"}, "sm89", "11.4.0", "one without weights"),
    ],
)
def test_a_plan_fits_its_gpu_and_version_only(change: dict[str, str], device: str, version: str, expected: str) -> None:
    assert misfit({**PARTS, **change}, device, version) == expected


def test_the_newest_fitting_plan_is_found_and_misfits_are_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as error:
        find_plan(tmp_path, "tensorrt", "sm89", "11.4.0")
    assert str(error.value) == "no tensorrt plan for sm89, TensorRT 11.4.0 (got none)"
    keep_engine(tmp_path, {**PARTS, "device": "sm80"}, "unet.plan", b"a")
    keep_engine(tmp_path, {**PARTS, "version": "10.16.1"}, "unet.plan", b"b")
    with pytest.raises(EngineError) as error:
        find_plan(tmp_path, "tensorrt", "sm89", "11.4.0")
    message = str(error.value)
    assert message.startswith("no tensorrt plan for sm89, TensorRT 11.4.0 (got ")
    assert "one for sm80" in message and "one of version 10.16.1" in message
    kept = keep_engine(tmp_path, PARTS, "unet.plan", b"c")
    assert find_plan(tmp_path, "tensorrt", "sm89", "11.4.0") == kept


@pytest.mark.parametrize(("rank", "taken"), [(0, 0), (1, 16), (16, 16), (17, 64), (64, 64)])
def test_the_smallest_rank_that_takes_the_adapters_is_found(tmp_path: Path, rank: int, taken: int) -> None:
    for one in (64, 0, 16):
        keep_engine(tmp_path, PARTS | ({"set.rank": str(one)} if one else {}), "unet.plan", b"plan")
    found = find_plan(tmp_path, "tensorrt", "sm89", "11.4.0", rank)
    assert rank_of(found.manifest.parts) == taken


def test_of_equal_ranks_the_newest_is_found_and_a_larger_one_serves_where_there_is_no_plan_without(
    tmp_path: Path,
) -> None:
    old, new = (keep_engine(tmp_path, {**PARTS, "set.rank": "16", "set.level": one}, "unet.plan", b"a") for one in "35")
    keep_engine(tmp_path, {**PARTS, "set.rank": "64"}, "unet.plan", b"b")
    for age, kept in enumerate((new, old)):
        os.utime(kept.path, (1e9 - age, 1e9 - age))
    for rank in (0, 16):
        assert find_plan(tmp_path, "tensorrt", "sm89", "11.4.0", rank) == new


def test_a_rank_above_all_plans_is_one_line_that_names_theirs(tmp_path: Path) -> None:
    keep_engine(tmp_path, PARTS, "unet.plan", b"a")
    keep_engine(tmp_path, {**PARTS, "set.rank": "16"}, "unet.plan", b"b")
    keep_engine(tmp_path, {**PARTS, "set.rank": "64", "device": "sm80"}, "unet.plan", b"c")
    with pytest.raises(EngineError) as error:
        find_plan(tmp_path, "tensorrt", "sm89", "11.4.0", 17)
    assert str(error.value) == "no tensorrt plan for adapters of rank 17 (got plans of rank 0, 16)"


def test_shapes_outside_the_profile_are_refused_with_both_ends() -> None:
    parts = {**PARTS, "shape.sample": "2x4x64x64/2x4x64x64/2x4x96x96"}
    check_shapes(parts, {"sample": (2, 4, 96, 64), "rest": (2, 77, 5)})
    with pytest.raises(EngineError) as error:
        check_shapes(parts, {"sample": (4, 4, 64, 64)})
    assert str(error.value) == (
        "sample: must be within 2x4x64x64 and 2x4x96x96, the shapes that the plan was built for, got 4x4x64x64; "
        "build a plan with a wider range, or take --target onnxruntime"
    )


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_without_tensorrt_the_reason_names_the_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "compute_capability", lambda: "sm89")
    assert tensorrt_engine.fits_here(bundle, "tensorrt") == (
        "tensorrt is not installed; run: pip install 'personalq[tensorrt]'"
    )
    assert tensorrt_engine.fits_here(bundle, "tensorrt-rtx") == (
        "tensorrt_rtx is not installed; install NVIDIA's tensorrt_rtx package"
    )


def test_without_the_cuda_runtime_that_is_the_reason(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARIES", ("libnothing.so",))
    cuda.library.cache_clear()
    try:
        reason = tensorrt_engine.fits_here(bundle, "tensorrt")
    finally:
        cuda.library.cache_clear()
    assert reason.startswith("CUDA: the runtime library must be here, got none; install NVIDIA's driver")
