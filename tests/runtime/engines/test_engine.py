"""ONNX Runtime opens what the manifest describes, and refuses in one line what it does not."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.bundle import Graphs, read_manifest
from personalq.errors import BundleError, EngineError, MissingExtraError, PersonalQError
from runtime.drawing.pipeline import Pipeline
from runtime.engines import engine as engine_module
from runtime.engines import sessions as sessions_module
from runtime.engines.engine import open_engine
from runtime.engines.ort import OrtEngine
from runtime.engines.sessions import has_int8_dot_product, one_line, open_session


def refusal(folder: Path, kind: type[PersonalQError]) -> str:
    with pytest.raises(kind) as error:
        OrtEngine(folder, threads=1)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_shapes_and_types_are_those_of_the_contract(bundle: Path) -> None:
    engine = OrtEngine(bundle, threads=1)
    embeds = engine.encode(np.zeros((2, 77), np.int64)).states
    rows = engine.text_rows(embeds, np.zeros((2, 4), np.int64))
    assert (embeds.shape, embeds.dtype) == ((2, 77, 8), np.float32)
    assert {name: (value.shape, str(value.dtype)) for name, value in rows.items()} == {
        "rows": ((2, 77, 16), "float32"),
        "rest": ((2, 77, 16), "int8"),
        "rest_scale": ((2, 77, 4), "float32"),
        "kept": ((2, 4, 16), "float16"),
    }
    image = engine.decode(np.zeros((1, 4, 8, 8), np.float32))
    assert image.shape == (1, 3, 16, 16)


def test_a_reference_bundle_takes_full_rows(reference: Path) -> None:
    engine = OrtEngine(reference, threads=1)
    rows = engine.text_rows(engine.encode(np.zeros((1, 77), np.int64)).states, np.zeros((1, 4), np.int64))
    assert list(rows) == ["rows"]
    assert engine.denoiser(rows, 8, 8)(np.zeros((1, 4, 8, 8), np.float32), 10).shape == (1, 4, 8, 8)


def test_bound_buffers_see_every_step(bundle: Path) -> None:
    conditioning = Pipeline(OrtEngine(bundle, threads=1)).rows("a photo of sks dog").conditioning
    engine = OrtEngine(bundle, threads=1)
    denoiser = engine.denoiser(conditioning, 8, 8)
    random = np.random.default_rng(0)
    for t in (900.0, 10.0):
        sample = random.standard_normal((1, 4, 8, 8)).astype(np.float32)
        timestep = np.array([t], np.float32)
        expected = engine._unet.run(None, {"sample": sample, "timestep": timestep, **conditioning})[0]
        assert (denoiser(sample, t) == expected).all()


@pytest.mark.parametrize("name", ["unet.ort.onnx", "tokenizer.json"])
def test_one_flipped_byte_is_refused_by_name(copied: Path, name: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    assert refusal(copied, BundleError) == (
        f"{name}: bytes differ from the sha256 in the manifest of bundle spoiled0; export the checkpoint again"
    )


def test_a_truncated_file_is_refused_by_name(copied: Path) -> None:
    content = (copied / "text_rows.onnx").read_bytes()
    (copied / "text_rows.onnx").write_bytes(content[:-10])
    assert refusal(copied, BundleError) == (
        f"text_rows.onnx: must be {len(content)} bytes in bundle spoiled0, got {len(content) - 10}; "
        "export the checkpoint again"
    )


def test_a_missing_graph_is_refused_by_name(copied: Path) -> None:
    (copied / "vae_decoder.onnx").unlink()
    expected = "vae_decoder.onnx: missing from bundle spoiled0; export the checkpoint again"
    assert refusal(copied, EngineError) == expected


def test_a_graph_that_is_no_graph_is_refused_in_one_line(copied: Path, reseal: Any) -> None:
    (copied / "vae_decoder.onnx").write_bytes(b"not a graph")
    reseal(copied)
    text = refusal(copied, EngineError)
    assert text.startswith(f"{copied}/vae_decoder.onnx: cannot be opened: ")
    assert text.endswith("; export the checkpoint again")


def test_a_graph_outside_the_list_of_files_must_exist(copied: Path, reseal: Any) -> None:
    graphs = read_manifest(copied).graphs
    reseal(copied, graphs=graphs.model_copy(update={"vae_decoder": "other.onnx"}))
    expected = f"{copied}/other.onnx: must be a graph, got no file; export the checkpoint again"
    assert refusal(copied, EngineError) == expected


def test_a_graph_with_other_inputs_is_refused(copied: Path, reseal: Any) -> None:
    graphs = read_manifest(copied).graphs
    reseal(copied, graphs=graphs.model_copy(update={"text_encoder": "vae_decoder.onnx"}))
    assert refusal(copied, EngineError) == (
        "vae_decoder.onnx: inputs must be input_ids, got latent; export the checkpoint again with this version"
    )


def test_a_bundle_for_other_targets_only_says_what_to_run(copied: Path, reseal: Any) -> None:
    graphs: Graphs = read_manifest(copied).graphs
    reseal(copied, graphs=graphs.model_copy(update={"unet": {"trt": "unet.ort.onnx"}}))
    assert refusal(copied, EngineError) == (
        f"bundle {read_manifest(copied).key[:12]}: must hold a UNet for 'ort', got trt; "
        "run 'personalq export moss-mug --target onnxruntime'"
    )


def test_hashes_are_computed_once_and_again_after_a_change(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    original = engine_module.file_sha256
    monkeypatch.setattr(engine_module, "file_sha256", lambda path: hashed.append(path.name) or original(path))
    OrtEngine(copied, threads=1)
    first = len(hashed)
    OrtEngine(copied, threads=1)
    assert first == len(read_manifest(copied).files) == len(hashed)
    content = (copied / "tokenizer.json").read_bytes()
    (copied / "tokenizer.json").write_bytes(content.replace(b"dog", b"god"))
    assert refusal(copied, BundleError).startswith("tokenizer.json: bytes differ")


def test_latents_that_do_not_fit_are_one_line(bundle: Path) -> None:
    pipeline = Pipeline(OrtEngine(bundle, threads=1))
    denoiser = pipeline.engine.denoiser({**pipeline.rows("").conditioning, "rest": np.zeros((1, 3, 1), np.int8)}, 8, 8)
    with pytest.raises(EngineError, match=r"^unet: cannot run on latents \(1, 4, 8, 8\): [^\n]+$"):
        denoiser(np.zeros((1, 4, 8, 8), np.float32), 1)
    with pytest.raises(EngineError, match=r"^image: cannot be computed from latent \(1, 3, 8, 8\): [^\n]+$"):
        pipeline.engine.decode(np.zeros((1, 3, 8, 8), np.float32))


def test_an_unknown_engine_is_refused(bundle: Path) -> None:
    with pytest.raises(EngineError) as error:
        open_engine("vulkan", bundle)
    assert (
        str(error.value)
        == "engine: must be one of onnxruntime, openvino, tensorrt, tensorrt-rtx, got 'vulkan'; choose another target"
    )
    assert open_engine("onnxruntime", bundle, threads=1).name == "onnxruntime"


def test_missing_onnxruntime_names_the_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed; run: pip install 'personalq\[cpu\]'"):
        open_session(bundle / "unet.ort.onnx", 1)


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("aarch64", "", True),
        ("x86_64", "flags: avx2 avx512_vnni", True),
        ("x86_64", "flags: avx2 avx_vnni", True),
        ("x86_64", "flags: avx2 avx512f", False),
    ],
    ids=["arm", "avx512 vnni", "avx vnni", "no vnni"],
)
def test_processors_without_int8_dot_product_are_known(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, expected: bool
) -> None:
    monkeypatch.setattr(sessions_module.platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", lambda self: flags)
    assert has_int8_dot_product() is expected


def test_engine_errors_lose_the_code_before_them() -> None:
    text = "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from /a/b.onnx failed:Protobuf parsing failed.\nmore"
    assert one_line(RuntimeError(text)) == "Protobuf parsing failed"
    assert one_line(RuntimeError()) == "RuntimeError"


def test_the_quantised_layers_run_on_integer_kernels(bundle: Path, tmp_path: Path) -> None:
    conditioning = Pipeline(OrtEngine(bundle, threads=1)).rows("sks").conditioning
    session = open_session(bundle / "unet.ort.onnx", 1, profile=tmp_path / "p")
    session.run(
        None, {"sample": np.zeros((1, 4, 8, 8), np.float32), "timestep": np.ones(1, np.float32), **conditioning}
    )
    kinds = {event.get("args", {}).get("op_name") for event in json.loads(Path(session.end_profiling()).read_text())}
    assert {"QLinearConv", "MatMulIntegerToFloat"} <= kinds and not {"Conv", "Gemm"} & kinds
