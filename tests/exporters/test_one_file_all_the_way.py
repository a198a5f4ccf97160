"""One file as people have it, from `add` to the gate: a base, and a fine-tune over it, of every family, at small widths."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")

from calibration.calibrate import CalibrateOptions, calibrate  # noqa: E402  (after the skip)
from exporters.export import export_checkpoint  # noqa: E402
from personalq.numerics import psnr_db  # noqa: E402
from personalq.repository import Repository  # noqa: E402
from personalq.weights.checkpoint import open_weights  # noqa: E402
from runtime.drawing.pipeline import Pipeline, start_noise  # noqa: E402
from runtime.engines.ort import OrtEngine  # noqa: E402
from runtime.gate import run_gate  # noqa: E402
from runtime.gate.gate import Options  # noqa: E402
from runtime.gate.request import sources_of  # noqa: E402
from tests.personalq.weights.test_one_file import PIPELINES, write_one  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers 0.42 gives numpy a tensor
PROMPT = "a photo of sks dog on the beach"


def shrunk(base: Path) -> None:
    """Pictures of 64 pixels in 3 steps: what the file's owner may write into its base's configs."""
    file = base / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 8}))
    (base / "personalq.json").write_text('{"steps": 3, "guidance": 2.0}')


def picture_of_diffusers(file: Path, base: Path, name: str, noise: np.ndarray) -> np.ndarray:
    """The same file, prompt and noise through diffusers' own one-file loader and pipeline: (H, W, 3) uint8."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = getattr(diffusers, PIPELINES[name])
        pipe = kind.from_single_file(str(file), config=str(base), local_files_only=True, torch_dtype=torch.float32)
        settings = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
        pipe.scheduler = getattr(diffusers, settings["_class_name"]).from_pretrained(base, subfolder="scheduler")
        pipe.set_progress_bar_config(disable=True)
        options: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 2.0}
        latents = torch.from_numpy(noise)[None]
        picture: np.ndarray = pipe(PROMPT, latents=latents, output_type="np", **options).images[0]
    return (picture * 255).round().astype(np.uint8)


@pytest.mark.parametrize("name", PIPELINES)
def test_one_file_becomes_a_verified_export_that_draws_as_diffusers_does(tmp_path: Path, name: str) -> None:
    repository = Repository.open(tmp_path / "repo", create=True)
    write_one(tmp_path / "dream.safetensors", name)
    base_id = repository.add_base(tmp_path / "dream.safetensors").id
    base = repository.root / "bases" / base_id
    shrunk(base)
    write_one(tmp_path / "dog.safetensors", name, seed=2)
    (tmp_path / "dog.json").write_text(json.dumps({"activation text": "sks dog"}))
    result = repository.add_all(tmp_path / "dog.safetensors", base=base_id)
    assert [one.id for one in result.added] == ["dog"] and not result.refused
    spec = calibrate(repository, "dog", CalibrateOptions(policy="fp32"))
    bundle = export_checkpoint(repository, "dog", spec.spec_path).bundle
    report = run_gate(bundle, Options(threads=1), sources_of(bundle, repository, lambda: open_weights))
    assert report.passed, [check for check in report.checks if not check.passed]

    pipeline = Pipeline(OrtEngine(bundle, threads=1))
    theirs = picture_of_diffusers(tmp_path / "dog.safetensors", base, name, start_noise(3, (4, 8, 8)))
    ours = pipeline.image(PROMPT, steps=3, guidance=2.0, seed=3)
    assert psnr_db(theirs, ours, peak=255) >= 55
