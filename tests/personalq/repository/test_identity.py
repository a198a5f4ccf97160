"""A checkpoint's hash follows the bytes of its weights. Folders never enter."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from personalq.repository.identity import weights_sha256


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
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
