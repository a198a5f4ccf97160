"""What pictures depend on besides weights: a checkpoint's own come first, and the choice is told with its source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from personalq.errors import RepositoryError
from personalq.repository.settings import SCHEDULER, read_settings

FILES: dict[str, dict[str, Any]] = {
    SCHEDULER: {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading"},
    "tokenizer/vocab.json": {"a": 0},
    "tokenizer_2/vocab.json": {"a": 0},
    "unet/config.json": {"sample_size": 64},
    "vae/config.json": {"scaling_factor": 0.2},
    "text_encoder/config.json": {},
    "model_index.json": {},
    "personalq.json": {"steps": 25},
}


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def weights(file: Path, names: tuple[str, ...] = ("x",), **metadata: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.zeros(2, np.float32) for name in names}, file, metadata=metadata)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", **FILES)


NAMES = (
    SCHEDULER,
    "model_index.json",
    "personalq.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_2/vocab.json",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_hash_follows_what_pictures_depend_on(base: Path, tmp_path: Path, name: str) -> None:
    first = read_settings(base).sha256({"trigger": "sks"})
    moved = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    (moved / "README.md").write_text("told to people")
    weights(moved / "unet" / "model.safetensors")  # weights have a hash of their own
    assert read_settings(moved).sha256({"trigger": "sks"}) == first
    assert read_settings(moved).sha256({"trigger": "zwx"}) != first
    write(moved, **{name: {"_class_name": "EulerDiscreteScheduler", "another": 1}})
    assert read_settings(moved).sha256({"trigger": "sks"}) != first


def test_a_checkpoint_without_settings_has_its_base_s(base: Path, tmp_path: Path) -> None:
    weights(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    own = read_settings(base, tmp_path / "lora")
    assert own == read_settings(base)
    assert (own.steps, own.guidance, own.scheduler_config) == (25, 7.5, FILES[SCHEDULER])
    assert set(own.sources.values()) == {"base"}
    assert own.sha256({}) == read_settings(base).sha256({})


def test_what_the_author_shipped_is_used_and_told(base: Path, tmp_path: Path) -> None:
    shipped = {
        SCHEDULER: {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"},
        "tokenizer/tokenizer.json": {"model": {}},
        "vae/config.json": {"scaling_factor": 0.5},
    }
    own = read_settings(base, write(tmp_path / "dog", **shipped))
    assert own.scheduler_config == shipped[SCHEDULER]
    assert own.scheduler.settings | shipped[SCHEDULER] == own.scheduler.settings
    assert own.tokenizers == {"tokenizer": tmp_path / "dog" / "tokenizer", "tokenizer_2": base / "tokenizer_2"}
    assert own.configs["vae"]["scaling_factor"] == 0.5 and own.configs["unet"] == FILES["unet/config.json"]
    told = {"scheduler", "tokenizer", "vae"}
    assert {name for name, source in own.sources.items() if source == "checkpoint"} == told
    assert own.sha256({}) != read_settings(base).sha256({})


V = {"prediction_type": "v_prediction"}
CASES: dict[str, tuple[dict[str, Any] | None, tuple[str, ...], dict[str, str], dict[str, Any], str]] = {
    "a mark over the base": (None, ("x", "v_pred"), {}, V, "tensor v_pred of one.safetensors"),
    "a mark over the own config": (
        {"prediction_type": "epsilon"}, ("v_pred",), {}, V, "tensor v_pred of one.safetensors",
    ),
    "a header over the base": (
        None, ("x",), {"modelspec.prediction_type": "v"}, V, "modelspec.prediction_type of one.safetensors",
    ),
    "the own config over a header": (
        {"prediction_type": "epsilon"}, ("x",), {"modelspec.prediction_type": "v"}, {"prediction_type": "epsilon"}, "",
    ),
    "a header where the own config is silent": (
        {"beta_start": 0.1}, ("x",), {"modelspec.prediction_type": "v"}, V, "modelspec.prediction_type of one.safetensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "names", "metadata", "wanted", "source"), CASES.values(), ids=CASES)
def test_where_sources_disagree_the_nearest_to_the_tensors_decides(
    base: Path,
    tmp_path: Path,
    config: dict[str, Any] | None,
    names: tuple[str, ...],
    metadata: dict[str, str],
    wanted: dict[str, Any],
    source: str,
) -> None:
    weights(tmp_path / "dog" / "one.safetensors", names, **metadata)
    if config is not None:
        write(tmp_path / "dog", **{SCHEDULER: {"_class_name": "DDIMScheduler", **config}})
    own = read_settings(base, tmp_path / "dog")
    assert own.scheduler.settings | wanted == own.scheduler.settings
    assert own.sources.get("scheduler.prediction_type", "") == source


def test_zero_terminal_snr_takes_the_last_time_step(base: Path, tmp_path: Path) -> None:
    weights(
        tmp_path / "dog" / "unet" / "diffusion_pytorch_model.safetensors", ("x",), **{"personalq.marks": "v_pred,ztsnr"}
    )
    own = read_settings(base, tmp_path / "dog")
    marked = V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert own.scheduler_config == FILES[SCHEDULER] | marked
    assert own.sha256({}) != read_settings(base).sha256({})


def test_a_config_that_means_another_graph_is_refused(base: Path, tmp_path: Path) -> None:
    write(tmp_path / "dog", **{"unet/config.json": {"sample_size": 96}})
    assert read_settings(base, tmp_path / "dog").configs["unet"] == {"sample_size": 96}
    write(tmp_path / "dog", **{"unet/config.json": {"attention_head_dim": 4}})
    with pytest.raises(
        RepositoryError, match=r"dog/unet/config.json: attention_head_dim must be 8 as in the base, got 4"
    ):
        read_settings(base, tmp_path / "dog")


def test_a_broken_file_is_one_line(base: Path) -> None:
    (base / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(RepositoryError, match=r"scheduler_config.json: must be JSON, got "):
        read_settings(base)
