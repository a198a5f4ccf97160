"""Graphs prepared for this machine give the same numbers and are made once; equal graphs are opened once for all bundles."""

import gc
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.bundle import read_manifest
from personalq.repository.engines import ENGINES
from runtime.drawing.pipeline import Pipeline
from runtime.engines import sessions
from runtime.engines.engine import unet_file
from runtime.engines.ort import OrtEngine
from runtime.engines.sessions import PREPARED, is_shared, open_session, open_shared, shared_bytes


@pytest.fixture
def fresh(copied: Path) -> Path:
    """A bundle that was never opened."""
    shutil.rmtree(copied / ENGINES, ignore_errors=True)
    return copied


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(file name, whether it was a prepared one) of every session that is opened."""
    seen: list[tuple[str, bool]] = []

    def spy(file: Path, *arguments: Any, is_prepared: bool = False, **named: Any) -> Any:
        seen.append((file.name, is_prepared))
        return open_session(file, *arguments, is_prepared=is_prepared, **named)

    monkeypatch.setattr(sessions, "open_session", spy)
    return seen


def prepared_files(bundle: Path, name: str = PREPARED) -> list[Path]:
    return sorted((bundle / ENGINES).glob(f"onnxruntime-*/{name}"))


def test_the_unet_is_prepared_once_and_gives_the_same_numbers(fresh: Path, opened: list[tuple[str, bool]]) -> None:
    first = Pipeline(OrtEngine(fresh, threads=1)).image("sks mug", seed=1, steps=2)
    assert ("unet.ort.onnx", False) in opened and len(prepared_files(fresh)) == 2  # the UNet and the text rows
    del opened[:]
    second = Pipeline(OrtEngine(fresh, threads=1)).image("sks mug", seed=1, steps=2)
    assert (PREPARED, True) in opened and ("unet.ort.onnx", False) not in opened
    assert np.array_equal(first, second)


@pytest.mark.parametrize("spoil", ["truncated", "changed", "gone"])
def test_a_spoiled_prepared_graph_is_made_again(
    fresh: Path, spoil: str, opened: list[tuple[str, bool]], caplog: pytest.LogCaptureFixture
) -> None:
    OrtEngine(fresh, threads=1)
    sizes = {}
    for file in prepared_files(fresh):
        content = file.read_bytes()
        sizes[file] = len(content)
        if spoil == "gone":
            file.unlink()
        else:
            file.write_bytes(content[:-9] if spoil == "truncated" else content[:-9] + bytes(9))
    del opened[:]
    with caplog.at_level(logging.WARNING, logger="personalq.runtime"):
        OrtEngine(fresh, threads=1)
    assert ("unet.ort.onnx", False) in opened and "preparing it again" in caplog.text
    assert {file: file.stat().st_size for file in prepared_files(fresh)} == sizes


def test_what_was_prepared_for_another_cpu_or_version_is_not_opened(
    fresh: Path, opened: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    OrtEngine(fresh, threads=1)
    for change in ("device_name", "version_of_onnxruntime"):
        del opened[:]
        monkeypatch.setattr(sessions, change, lambda: "another")
        OrtEngine(fresh, threads=1)
        assert ("unet.ort.onnx", False) in opened


def test_a_bundle_that_cannot_be_written_is_opened_all_the_same(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    (fresh / ENGINES).write_text("a file where the folder belongs")
    with caplog.at_level(logging.WARNING, logger="personalq.runtime"):
        engine = OrtEngine(fresh, threads=1)
    assert Pipeline(engine).image("sks mug", steps=1).shape == (16, 16, 3)
    assert "unet.ort.onnx: not prepared for the next opening" in caplog.text


def test_an_engine_is_not_whole_after_what_it_maps_was_cut_off(fresh: Path) -> None:
    OrtEngine(fresh, threads=1)
    engine = OrtEngine(fresh, threads=1)
    assert engine.is_whole()
    file = prepared_files(fresh)[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert not engine.is_whole()


def test_equal_text_encoders_and_decoders_are_opened_once_and_closed_with_their_last_user(
    fresh: Path, tmp_path: Path, opened: list[tuple[str, bool]]
) -> None:
    twin = shutil.copytree(fresh, tmp_path / "twin")
    manifest = read_manifest(fresh)
    one, two = OrtEngine(fresh, threads=7), OrtEngine(twin, threads=7)
    assert [name for name, _ in opened].count(manifest.graphs.text_encoder) == 1
    assert [name for name, _ in opened].count(manifest.graphs.vae_decoder) == 1
    assert [name for name, _ in opened].count(unet_file(manifest)) == 2  # each its own
    del one
    gc.collect()
    assert is_shared(manifest, manifest.graphs.text_encoder, 7)
    assert Pipeline(two).image("sks mug", steps=1).shape == (16, 16, 3)
    del two
    gc.collect()
    assert not is_shared(manifest, manifest.graphs.text_encoder, 7)


def test_a_shared_graph_whose_file_changed_is_not_given_to_the_next(fresh: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(fresh, tmp_path / "twin")
    manifest = read_manifest(fresh)
    graph = manifest.graphs.text_encoder
    first = open_shared(fresh, manifest, graph, 6)
    assert open_shared(twin, manifest, graph, 6) is first
    (fresh / graph).write_bytes((fresh / graph).read_bytes()[:-1])
    second = open_shared(twin, manifest, graph, 6)
    assert second is not first and second.is_whole() and not first.is_whole()


def test_shared_memory_is_what_is_open(fresh: Path) -> None:
    manifest = read_manifest(fresh)
    before = shared_bytes()
    opened = open_shared(fresh, manifest, manifest.graphs.vae_decoder, 5)
    assert shared_bytes() == before + opened.bytes
    del opened
    gc.collect()
    assert shared_bytes() <= before
