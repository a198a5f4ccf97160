"""OpenVINO draws what ONNX Runtime draws, keeps what it compiled, and falls back to compiling when that is spoiled."""

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.errors import BundleError, EngineError, MissingExtraError
from personalq.numerics import cosine, psnr_db
from personalq.repository.engines import engines_of
from runtime.drawing.pipeline import Pipeline, start_noise
from runtime.engines import openvino as openvino_engine
from runtime.engines.engine import open_engine
from runtime.engines.openvino import OpenVinoEngine, compile_properties
from runtime.engines.ort import OrtEngine
from runtime.engines.sessions import open_session
from tests.runtime.one_layer import write_layer

pytest.importorskip("openvino", reason="openvino is not installed: pip install 'personalq[openvino]'")
PROMPT = "a photo of sks dog on the beach"


@pytest.fixture
def engine(copied: Path) -> OpenVinoEngine:
    return OpenVinoEngine(copied, threads=1)


def test_every_graph_gives_what_onnxruntime_gives(engine: OpenVinoEngine, bundle: Path) -> None:
    other = OrtEngine(bundle, threads=1)
    ids = np.stack([Pipeline(other).tokenizer.encode(text).ids for text in (PROMPT, "")])
    embeds = engine.encode(ids).states
    assert np.allclose(embeds, other.encode(ids).states, atol=1e-5)
    index = np.array([[4, 0, 0, 0], [0, 0, 0, 0]])
    mine, theirs = engine.text_rows(embeds, index), other.text_rows(embeds, index)
    assert {name: value.dtype for name, value in mine.items()} == {name: value.dtype for name, value in theirs.items()}
    assert (mine["kept"] == mine["rows"][[[0], [1]], index].astype(np.float16)).all()
    assert np.abs(mine["rest"].astype(int) - theirs["rest"]).max() <= 1
    latent = start_noise(0, (2, 4, 8, 8))
    assert psnr_db(other.decode(latent), engine.decode(latent), peak=2.0) > 40  # bf16: 8 bits of mantissa


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
@pytest.mark.parametrize("engine_name", ["onnxruntime", "openvino"])
def test_the_largest_integers_are_multiplied_without_saturation(tmp_path: Path, op: str, engine_name: str) -> None:
    """255 (zero point 128) times 127, 64 times: 127 * 127 * 64, and not what 16 bits hold of pairs of products."""
    shape, kernel = ((1, 64, 8, 8), (1, 1)) if op == "Conv" else ((1, 32, 64), ())
    weight = np.full((64, 64, *kernel), 127, np.int8)
    graph = write_layer(tmp_path / "layer.onnx", weight, 1 / 127, (1 / 127, 1))
    x = np.ones(shape, np.float32)
    if engine_name == "onnxruntime":
        made = open_session(graph, 1).run(None, {"x": x})[0]
    else:
        compiled = openvino_engine._compile(graph, {"x": shape}, compile_properties("f32", 1))
        made = compiled([x])[0]
    assert np.allclose(made, 64, rtol=0.01)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_a_batch_of_any_size_is_run_in_slices(engine: OpenVinoEngine, bundle: Path, batch: int) -> None:
    rows = Pipeline(OrtEngine(bundle, threads=1)).rows(PROMPT).conditioning
    many = {name: np.concatenate([value] * batch) for name, value in rows.items()}
    sample = start_noise(1, (batch, 4, 8, 8))
    expected = OrtEngine(bundle, threads=1).denoiser(many, 8, 8)(sample, 500.0)
    made = engine.denoiser(many, 8, 8)(sample, 500.0)
    assert made.shape == expected.shape and cosine(expected, made) > 0.99


def test_a_picture_is_close_to_onnxruntimes_and_the_seed_decides_it(engine: OpenVinoEngine, bundle: Path) -> None:
    mine = Pipeline(engine).image(PROMPT, seed=3)
    assert psnr_db(Pipeline(OrtEngine(bundle, threads=1)).image(PROMPT, seed=3), mine, peak=255) > 25
    assert (Pipeline(engine).image(PROMPT, seed=3) == mine).all()


def test_other_sizes_are_compiled_when_they_are_asked_for(engine: OpenVinoEngine) -> None:
    assert Pipeline(engine).image(PROMPT, width=24, height=8, steps=1).shape == (8, 24, 3)


def test_a_second_opening_compiles_nothing(
    engine: OpenVinoEngine, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Pipeline(engine).image(PROMPT, steps=2)
    kept = engines_of(copied, "openvino")
    assert {one.manifest.parts["graph"] for one in kept} == {
        "text_encoder.onnx",
        "text_rows.onnx",
        "unet.ort.onnx",
        "vae_decoder.onnx",
    }
    monkeypatch.setattr(openvino_engine, "_compile", lambda *_: pytest.fail("compiled again"))
    assert (Pipeline(OpenVinoEngine(copied, threads=1)).image(PROMPT, steps=2) == before).all()


@pytest.mark.parametrize("spoil", ["blob", "manifest", "short"])
def test_a_spoiled_blob_is_compiled_again_with_a_warning(
    engine: OpenVinoEngine, copied: Path, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = next(one for one in engines_of(copied, "openvino") if one.manifest.parts["graph"] == "unet.ort.onnx")
    content = kept.path.read_bytes()
    if spoil == "manifest":
        (kept.path.parent / "manifest.json").write_text("{}")
    else:
        kept.path.write_bytes(content[:-1] if spoil == "short" else content[:100] + b"x" + content[101:])
    with caplog.at_level(logging.WARNING, "personalq.runtime"):
        again = OpenVinoEngine(copied, threads=1)
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith("is made again; compiling again")
    caplog.clear()
    OpenVinoEngine(copied, threads=1)
    assert not caplog.messages
    assert Pipeline(again).image(PROMPT, steps=1).shape == (16, 16, 3)


def test_another_version_of_openvino_compiles_for_itself(
    engine: OpenVinoEngine, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_engine, "device_name", lambda: "another CPU")
    OpenVinoEngine(copied, threads=1)
    devices = {one.manifest.parts["device"] for one in engines_of(copied, "openvino")}
    assert "another CPU" in devices and len(devices) == 2


def test_a_bundle_that_cannot_be_written_is_served_and_says_so(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(copied / "engines", ignore_errors=True)
    (copied / "engines").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING, "personalq.runtime"):
        engine = OpenVinoEngine(copied, threads=1)
    assert Pipeline(engine).image(PROMPT, steps=1).shape == (16, 16, 3)
    assert any(message.startswith("the compiled graph is not kept: ") for message in caplog.messages)


def test_a_changed_bundle_is_refused_before_anything_is_compiled(copied: Path) -> None:
    content = bytearray((copied / "unet.ort.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "unet.ort.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"^unet.ort.onnx: bytes differ from the sha256 in the manifest"):
        OpenVinoEngine(copied)


def test_a_graph_that_is_no_graph_is_refused_in_one_line(copied: Path, reseal: Any) -> None:
    (copied / "vae_decoder.onnx").write_bytes(b"not a graph")
    reseal(copied)
    with pytest.raises(EngineError) as error:
        OpenVinoEngine(copied).decode(np.zeros((1, 4, 8, 8), np.float32))
    assert str(error.value).startswith(f"{copied}/vae_decoder.onnx: cannot be compiled: ")
    assert "\n" not in str(error.value)


def test_missing_openvino_names_the_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino_engine._core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    try:
        with pytest.raises(MissingExtraError) as error:
            open_engine("openvino", bundle)
    finally:
        openvino_engine._core.cache_clear()
        openvino_engine.around_int8.cache_clear()
    assert str(error.value) == "openvino is not installed; run: pip install 'personalq[openvino]'"


def test_prompts_of_several_chunks_are_compiled_for(open_bundle: Path) -> None:
    engine, other = OpenVinoEngine(open_bundle, threads=1), OrtEngine(open_bundle, threads=1)
    assert engine.takes_chunks and other.takes_chunks
    long = PROMPT + " in the snow" * 30
    mine, theirs = (Pipeline(one).image(long, negative_prompt="snow", seed=3) for one in (engine, other))
    assert psnr_db(theirs, mine, peak=255) > 25
    assert Pipeline(engine).rows(long).n_rows == 154
    assert psnr_db(Pipeline(other).image(PROMPT), Pipeline(engine).image(PROMPT), peak=255) > 25


def test_a_bundle_of_fixed_graphs_takes_one_chunk(engine: OpenVinoEngine) -> None:
    assert not engine.takes_chunks and Pipeline(engine).rows("snow " * 80).n_rows == 77
