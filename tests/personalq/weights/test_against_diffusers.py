"""Every layout that diffusers loads, loaded by its own loaders and read by ours: equal names, shapes and values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: E402  (after the skip)

from personalq.weights.checkpoint import CheckpointWeights, open_weights  # noqa: E402
from tests.exporters import architectures  # noqa: E402
from tests.personalq.weights.test_layouts import one_file  # noqa: E402

PIPELINES = {"sd1": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
MODELS = ("unet", "text_encoder", "text_encoder_2", "vae")
SHARDED = {"max_shard_size": "40KB"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one file a model": {},
    "fp16 variant": {"variant": "fp16"},
    "bf16 variant": {"variant": "bf16"},
    "non_ema variant": {"variant": "non_ema"},
    "shards": SHARDED,
    "shards of a variant": {"variant": "fp16", **SHARDED},
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def assert_equal(weights: CheckpointWeights, pipe: Any) -> None:
    for name in MODELS:
        if (model := getattr(pipe, name, None)) is None:
            continue
        ours, theirs = weights.component(name), dict(model.named_parameters())
        assert set(ours.names()) == set(theirs)
        for parameter, value in theirs.items():
            read = np.asarray(ours.read(parameter), np.float32)
            np.testing.assert_array_equal(read, value.detach().float().numpy(), err_msg=f"{name}.{parameter}")


def quietly(load: Any, *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(*arguments, torch_dtype=torch.float32, local_files_only=True, **options)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_folder_is_read_as_from_pretrained_loads_it(tmp_path: Path, name: str, layout: dict[str, Any]) -> None:
    pipe = getattr(architectures, name)()
    pipe.to(DTYPES.get(layout.get("variant", ""), torch.float32)).save_pretrained(tmp_path, **layout)
    assert bool(list(tmp_path.glob("unet/*.index*.json"))) == ("max_shard_size" in layout)
    loaded = quietly(PIPELINES[name].from_pretrained, tmp_path, variant=layout.get("variant"))
    assert_equal(open_weights(tmp_path, None, "dreambooth"), loaded)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_one_file_checkpoint_is_read_as_from_single_file_loads_it(tmp_path: Path, name: str) -> None:
    base, folder = tmp_path / "base", tmp_path / "one"
    getattr(architectures, name)().save_pretrained(base)
    folder.mkdir()
    other = getattr(architectures, name)(seed=3)
    one_file(other, name, folder / "model.safetensors")
    weights = open_weights(base, folder, "dreambooth")
    loaded = quietly(PIPELINES[name].from_single_file, str(folder / "model.safetensors"), config=str(base))
    assert_equal(weights, loaded)
    assert weights.component("unet").changed == set(weights.component("unet").names())
