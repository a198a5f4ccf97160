"""A checkpoint's hashes follow bytes: of weights, and of what else its pictures depend on. Folders never enter."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from personalq.repository.identity import settings_sha256, weights_sha256


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    files = {
        "scheduler/scheduler_config.json": {"prediction_type": "epsilon"},
        "tokenizer/vocab.json": {"a": 0},
        "tokenizer_2/vocab.json": {"a": 0},
        "unet/config.json": {},
        "model_index.json": {},
        "personalq.json": {"steps": 25},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    write(folder / "unet" / "model.safetensors", 1)
    return folder


def write(file: Path, value: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": np.full((2, 6), value, np.float32)}, file)


def test_weights_follow_bytes_and_not_folders(base: Path, tmp_path: Path) -> None:
    delta, moved = tmp_path / "delta", tmp_path / "elsewhere"
    write(delta / "embeds.safetensors", 1)
    first = weights_sha256(base, delta)
    shutil.copytree(base, moved / "base")
    shutil.copytree(delta, moved / "delta")
    assert weights_sha256(moved / "base", moved / "delta") == first
    assert weights_sha256(base, None) != first
    write(moved / "delta" / "embeds.safetensors", 2)
    assert weights_sha256(moved / "base", moved / "delta") != first


SETTINGS = (
    *("scheduler/scheduler_config.json", "model_index.json", "personalq.json"),
    *("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/vocab.json"),
)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_follow_what_pictures_depend_on(base: Path, tmp_path: Path, name: str) -> None:
    first = settings_sha256(base, {"trigger": "sks"})
    moved = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    (moved / "README.md").write_text("told to people")
    write(moved / "unet" / "model.safetensors", 2)  # weights have a hash of their own
    assert settings_sha256(moved, {"trigger": "sks"}) == first != settings_sha256(moved, {"trigger": "zwx"})
    (moved / name).write_text("another")
    assert settings_sha256(moved, {"trigger": "sks"}) != first
