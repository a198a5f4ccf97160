"""Attached adapters on a base's TensorRT plans: which plan is opened and when, and that it draws as ONNX Runtime does.

No GPU: plans and CUDA are stand-ins that compute the base's own `trt` graphs (gpu_stand_in).
"""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.adapters import ADAPTER, AdapterManifest, Correction
from personalq.bundle import MANIFEST, AdapterInputs, CheckpointEntry, Manifest, manifest_bytes
from personalq.errors import EngineError
from personalq.numerics import psnr_db
from personalq.repository.engines import keep_engine
from personalq.weights.adapter import Adapter, Branch
from runtime import targets
from runtime.drawing.attaching import Chosen, Opened
from runtime.drawing.pipeline import Pipeline
from runtime.engines.attached import PLAIN, Attached, Worn, attach, side_by_side
from runtime.engines.ort import OrtEngine
from runtime.engines.tensorrt import TensorRtEngine
from tests.exporters.adapters import random_adapter
from tests.runtime.gpu_stand_in import HostCuda, HostPlan, stand_in

PARTS = {"target": "tensorrt", "device": "sm89", "version": "11.4.0"}
TOLERANCE = 1e-5  # FP32 on both sides, the same layers in other operators; predictions of about 1
HALF_TOLERANCE = 5e-3  # float16 arithmetic beside FP32
EQUAL_DB = 55.0  # pictures of 8 bits in which nothing but single steps of a pixel differ
ARCHITECTURES = ("sd1", "sdxl")
Gpu = tuple[HostCuda, list[HostPlan]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, traces: Path) -> Callable[[str, str], Path]:
    """(architecture, 'fp32' or 'fp16') -> a base's bundle, unquantised."""
    pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
    from exporters.export import export_base
    from exporters.request import reference_spec
    from tests.exporters.families import Made

    made = {name: Made(name, tmp_path_factory.mktemp(name), traces) for name in ARCHITECTURES}

    def bundle(name: str, storage: str) -> Path:
        repository = made[name].repository
        return export_base(repository, "tiny", reference_spec(repository, "tiny", storage)).bundle

    return cache(bundle)


@pytest.fixture
def base(request: pytest.FixtureRequest, export: Callable[[str, str], Path]) -> Iterator[Path]:
    """Of SD1.x, unless a test asks for another."""
    bundle = export(getattr(request, "param", "sd1"), "fp32")
    yield bundle
    shutil.rmtree(bundle / "engines", ignore_errors=True)


def keep_plans(bundle: Path, *ranks: int, **parts: str) -> None:
    for rank in ranks:
        graph = bundle / (f"unet.trt_rank{rank}.onnx" if rank else "unet.trt.onnx")
        own = {"set.rank": str(rank)} if rank else {}
        keep_engine(bundle, {**PARTS, **own, **parts}, "unet.plan", str(graph).encode())


def inputs_of(bundle: Path) -> AdapterInputs:
    inputs = Manifest.model_validate_json((bundle / MANIFEST).read_bytes()).adapters
    assert inputs is not None
    return inputs


def adapter(bundle: Path, rank: int, seed: int = 0, **conditions: bool) -> Adapter:
    """Of every layer that a plan takes; is_wide: of every layer of the UNet; with_text: also of the first text encoder."""
    found = {}
    for graph, places in inputs_of(bundle).branches.items():
        if graph == "unet" or (graph == "text_encoder" and conditions.get("with_text")):
            chosen = [name for name, place in places.items() if not place.is_wide or conditions.get("is_wide")]
            made = random_adapter(places, chosen, rank, seed)
            halves = {name: (one.down.astype(np.float16), one.up.astype(np.float16)) for name, one in made.items()}
            found[graph] = {name: Branch(*pair) for name, pair in halves.items()}
    return Adapter(found)


def adapter_manifest(bundle: Path, made: Adapter, spec_sha256: str = "") -> AdapterManifest:
    """As if it was exported for the base. spec_sha256: of a correction that it has."""
    manifest = Manifest.model_validate_json((bundle / MANIFEST).read_bytes())
    return AdapterManifest(
        key="a" * 64,
        key_parts={},
        checkpoint=CheckpointEntry(id="rex", name="Rex", kind="lora", base="tiny", trigger=("sks",), sha256="b" * 64),
        base_sha256=manifest.key_parts["weights"],
        family=manifest.family,
        exporter_version="1",
        scheduler=manifest.scheduler,
        rank=made.rank,
        correction=Correction(spec_sha256=spec_sha256, rank=4) if spec_sha256 else None,
    )


def adapter_bundle(bundle: Path, folder: Path, made: Adapter, spec_sha256: str = "") -> Path:
    folder.mkdir()
    (folder / ADAPTER).write_bytes(made.to_bytes())
    (folder / MANIFEST).write_bytes(manifest_bytes(adapter_manifest(bundle, made, spec_sha256)))
    return folder


def largest_difference(ours: Any, theirs: Any, batch: int) -> float:
    """Over three steps, of which the last one is a launched CUDA graph."""
    random, found = np.random.default_rng(0), []
    for timestep in (900.0, 500.0, 100.0):
        sample = random.standard_normal((batch, 4, 8, 12)).astype(np.float32)
        found.append(np.abs(ours(sample, timestep) - theirs(sample, timestep)).max())
    return float(max(found))


def both(base: Path, attached: Attached, batch: int = 2) -> tuple[float, OrtEngine, TensorRtEngine]:
    """What the plan predicts beside ONNX Runtime, and the two engines."""
    ours, theirs = TensorRtEngine(base, threads=1), OrtEngine(base, threads=1)
    rows = Pipeline(theirs).rows("a red mug").conditioning
    conditioning = {name: np.repeat(value, batch, axis=0) for name, value in rows.items()}
    bound = (one.denoiser(conditioning, 8, 12, attached) for one in (ours, theirs))
    return largest_difference(*bound, batch), theirs, ours


@pytest.mark.parametrize("base", ARCHITECTURES, indirect=True)
@pytest.mark.parametrize(("rank", "taken"), [(3, 16), (16, 16), (20, 64)])
def test_an_adapter_is_drawn_on_the_smallest_plan_that_takes_it(base: Path, gpu: Gpu, rank: int, taken: int) -> None:
    keep_plans(base, 0, 16, 64)
    attached = attach(inputs_of(base), [Worn(adapter(base, rank), 0.7)])
    difference, *_ = both(base, attached)
    assert difference <= TOLERANCE
    (plan,) = gpu[1]
    narrow = {name: place for name, place in inputs_of(base).branches["unet"].items() if not place.is_wide}
    for name, place in narrow.items():
        n, k = place.weight[:2]
        down = (2, k, taken) if place.op == "linear" else (2, taken, k)
        assert plan.shapes[f"{name}.down"] == down and plan.shapes["adapter_strength"] == (2,)
        assert plan.shapes[f"{name}.up"] == ((2, taken, n) if place.op == "linear" else (2, n, taken))


def test_pictures_of_one_batch_have_an_adapter_each(base: Path, gpu: Gpu) -> None:
    keep_plans(base, 0, 16)
    inputs = inputs_of(base)
    each = [attach(inputs, [Worn(adapter(base, 3, seed=1), 0.5)]), attach(inputs, [Worn(adapter(base, 9, seed=2))])]
    difference, *_ = both(base, side_by_side(each, inputs))
    assert difference <= TOLERANCE


def test_a_float16_plan_gets_float16_matrices(export: Callable[[str, str], Path], gpu: Gpu) -> None:
    bundle = export("sd1", "fp16")
    keep_plans(bundle, 0, 16)
    attached = attach(inputs_of(bundle), [Worn(adapter(bundle, 3), 0.7)])
    difference, *_ = both(bundle, attached)
    (plan,) = gpu[1]
    assert {plan.get_tensor_dtype(name) for name in plan.shapes if name.endswith((".down", ".up"))} == {np.float16}
    assert difference <= HALF_TOLERANCE


def test_without_adapters_the_plan_of_rank_0_has_no_inputs_for_them(base: Path, gpu: Gpu) -> None:
    keep_plans(base, 0, 16)
    difference, *_ = both(base, PLAIN)
    assert difference <= TOLERANCE
    assert not any(name.endswith((".down", ".up")) or name == "adapter_strength" for name in gpu[1][0].shapes)


def test_without_a_plan_of_rank_0_zeros_are_fed_to_a_larger_one(base: Path, gpu: Gpu) -> None:
    keep_plans(base, 16)
    difference, *_ = both(base, PLAIN)
    assert difference <= TOLERANCE and "adapter_strength" in gpu[1][0].shapes


def test_a_plan_is_opened_by_the_first_picture_that_needs_it_and_kept(base: Path, gpu: Gpu) -> None:
    keep_plans(base, 0, 16, 64)
    engine, plans = TensorRtEngine(base, threads=1), gpu[1]
    conditioning = Pipeline(OrtEngine(base, threads=1)).rows("a red mug").conditioning
    assert plans == []
    opened = []
    for rank in (3, 0, 16, 3, 20, 64):
        worn = [Worn(adapter(base, rank))] if rank else []
        engine.denoiser(conditioning, 8, 12, attach(inputs_of(base), worn))
        opened.append(len(plans))
    assert opened == [1, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("base", ARCHITECTURES, indirect=True)
def test_a_picture_equals_onnx_runtimes_text_encoder_and_all(base: Path, gpu: Gpu) -> None:
    keep_plans(base, 0, 16)
    made = adapter(base, 3, with_text=True)
    chosen = [Chosen(Opened(adapter_manifest(base, made), made), 0.3)]
    ours, theirs, plain = (
        Pipeline(engine(base, threads=1), worn).image("a sks mug", negative_prompt="blue", steps=3, guidance=3.0)
        for engine, worn in ((TensorRtEngine, chosen), (OrtEngine, chosen), (TensorRtEngine, []))
    )
    assert psnr_db(theirs, ours, peak=255) >= EQUAL_DB > psnr_db(plain, ours, peak=255) + 10


def test_a_rank_above_every_plans_is_one_line(base: Path, gpu: Gpu) -> None:
    keep_plans(base, 0, 16)
    with pytest.raises(EngineError) as error:
        both(base, attach(inputs_of(base), [Worn(adapter(base, 10)), Worn(adapter(base, 7, seed=1))]))
    assert str(error.value) == (
        "no tensorrt plan for adapters of rank 17 (got plans of rank 0, 16); build one with --set rank, or draw it with "
        "onnxruntime"
    )
    assert gpu[1] == []


def test_an_adapter_of_other_layers_is_one_line(base: Path, gpu: Gpu) -> None:
    keep_plans(base, 0, 16)
    with pytest.raises(EngineError) as error:
        both(base, attach(inputs_of(base), [Worn(adapter(base, 2, is_wide=True))]))
    assert str(error.value) == (
        "tensorrt: must be given adapters of attention layers, got one that changes others too, which its plans take no "
        "matrices for; draw it with onnxruntime"
    )


def test_a_batch_outside_the_plans_profile_is_refused(base: Path, gpu: Gpu) -> None:
    keep_plans(base, 16, **{"shape.adapter_strength": "2/2/2"})
    with pytest.raises(EngineError, match=r"^adapter_strength: must be within 2 and 2, .* got 3; build a plan"):
        both(base, attach(inputs_of(base), [Worn(adapter(base, 2))]), batch=3)


def test_without_any_plan_a_base_is_not_opened(base: Path, gpu: Gpu) -> None:
    with pytest.raises(EngineError, match=r"^no tensorrt plan for sm89, TensorRT 11\.4\.0 \(got none\)$"):
        TensorRtEngine(base, threads=1)


def test_whether_an_adapter_fits_is_said_before_anything_is_opened(base: Path, gpu: Gpu, tmp_path: Path) -> None:
    keep_plans(base, 0, 16)
    small, large, wide = (
        adapter_bundle(base, tmp_path / f"a{i}", adapter(base, rank, is_wide=is_wide))
        for i, (rank, is_wide) in enumerate([(16, False), (17, False), (2, True)])
    )
    assert targets.misfit(base, "tensorrt") == targets.misfit(base, "tensorrt", small) == ""
    told = "no tensorrt plan for adapters of rank 17 (got plans of rank 0, 16)"
    assert targets.misfit(base, "tensorrt", large) == told
    assert targets.misfit(base, "tensorrt", wide).startswith("TensorRT takes adapters of attention layers alone")
    assert targets.misfit(base, "onnxruntime", wide) == "" and gpu[1] == []


def test_ranks_of_the_text_do_not_count_and_a_correction_does_on_its_own_engine(
    base: Path, gpu: Gpu, tmp_path: Path
) -> None:
    keep_plans(base, 0, 16)
    inputs, spec = inputs_of(base), Manifest.model_validate_json((base / MANIFEST).read_bytes()).spec.sha256
    random = np.random.default_rng(0)
    wide_text = {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k": Branch(*_halves(random, 8, 40, 8))}
    of_text = Adapter({"unet": wide_text, "text_encoder": {"q_proj": Branch(*_halves(random, 8, 50, 8))}})
    assert targets.ranks(base, adapter_bundle(base, tmp_path / "text", of_text)) == {}
    assert attach(inputs, [Worn(Adapter({"unet": wide_text}))]).rank(inputs) == 0

    corrected = Adapter({"unet": adapter(base, 13).branches["unet"]}, correction=adapter(base, 4).branches["unet"])
    here = adapter_bundle(base, tmp_path / "here", corrected, spec)
    elsewhere = adapter_bundle(base, tmp_path / "elsewhere", corrected, "0" * 64)
    assert targets.misfit(base, "tensorrt", elsewhere) == ""
    assert targets.misfit(base, "tensorrt", here).startswith("no tensorrt plan for adapters of rank 17")
    assert attach(inputs, [Worn(corrected)]).rank(inputs) == max(targets.ranks(base, here).values()) == 17


def _halves(random: np.random.Generator, k: int, rank: int, n: int) -> list[np.ndarray]:
    return [random.standard_normal(shape).astype(np.float16) for shape in ((k, rank), (rank, n))]
