"""The trained base draws latents of odd sides as diffusers does: two downsamplings, each of which rounds up."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from exporters.export import export_checkpoint
from exporters.request import reference_spec
from gallery.record import REPOSITORY
from personalq.numerics import psnr_db
from personalq.repository import Repository
from runtime.drawing.pipeline import Pipeline, start_noise
from runtime.engines.ort import OrtEngine

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")
PROMPT = "a photo of sks dog on the beach"


def test_pictures_of_odd_latents_equal_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calibration.model.pipeline import load_pipeline

    root = shutil.copytree(REPOSITORY, tmp_path / "repository", ignore=shutil.ignore_patterns("bundles", "families"))
    repository = Repository.open(root)
    bundle = export_checkpoint(
        repository, "biscuit-the-dog", reference_spec(repository, "biscuit-the-dog", "fp32")
    ).bundle
    ours, theirs = Pipeline(OrtEngine(bundle, threads=1)), load_pipeline(repository, repository.card("biscuit-the-dog"))
    monkeypatch.setattr(theirs, "check_inputs", lambda *_, **__: None)  # asks for multiples of 8 pixels; this VAE has 4
    for height, width in ((17, 15), (13, 22)):
        noise, scale = start_noise(3, (4, height, width)), ours.manifest.latent.scale
        drawn = ours.image(PROMPT, noise=noise, steps=6, guidance=4.0)
        settings = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "np"}
        sides = {"height": height * scale, "width": width * scale, "latents": torch.from_numpy(noise)[None]}
        wanted = np.rint(theirs(PROMPT, **settings, **sides).images[0] * 255)
        assert drawn.shape == wanted.shape == (height * scale, width * scale, 3)
        assert psnr_db(wanted, drawn, peak=255) >= 55
