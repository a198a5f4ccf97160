"""A checkpoint that brings its own scheduler, tokenizer and VAE scaling over a named base: used from calibration to the gate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'personalq[export]'")

from calibration.calibrate import CalibrateOptions, calibrate  # noqa: E402  (after the skip)
from exporters.export import export_checkpoint  # noqa: E402
from personalq.bundle import read_manifest  # noqa: E402
from personalq.numerics import psnr_db  # noqa: E402
from personalq.repository import Repository  # noqa: E402
from personalq.weights.checkpoint import open_weights  # noqa: E402
from runtime.drawing.pipeline import Pipeline, start_noise  # noqa: E402
from runtime.engines.ort import OrtEngine  # noqa: E402
from runtime.gate import run_gate  # noqa: E402
from runtime.gate.gate import Options  # noqa: E402
from runtime.gate.request import sources_of  # noqa: E402
from tests.conftest import tiny_pipeline  # noqa: E402
from tests.repositories import add_family  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers 0.42 gives numpy a tensor
PROMPT = "a photo of <rex> in the forest"


def shipped(folder: Path) -> Any:
    """A DreamBooth folder with an added token, another scheduler and another latent scaling; returns diffusers' pipeline."""
    from diffusers import EulerDiscreteScheduler

    pipe = tiny_pipeline(seed=4)
    pipe.tokenizer.add_tokens(["<rex>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    pipe.scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1
    )
    pipe.vae.register_to_config(scaling_factor=0.3)
    for name in ("unet", "text_encoder", "tokenizer", "vae"):
        getattr(pipe, name).save_pretrained(folder / name)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    card = {"id": "own", "kind": "dreambooth", "base": "tiny", "trigger": ["<rex>"], "class_noun": "dog"}
    (folder / "card.json").write_text(json.dumps(card))
    return pipe


def test_what_the_author_shipped_is_drawn_with_though_a_base_is_named(
    tiny_base: Path, tmp_path: Path, traces: Path
) -> None:
    root = tmp_path / "repo"
    shutil.copytree(tiny_base, root / "bases" / "tiny")
    (root / "bases" / "tiny" / "personalq.json").write_text('{"steps": 3, "guidance": 2.0}')
    add_family(root, "tiny", traces)
    pipe = shipped(tmp_path / "own")
    repository = Repository.open(root)
    result = repository.add_all(tmp_path / "own")
    assert not result.refused and [one.id for one in result.added] == ["own"]
    spec = calibrate(repository, "own", CalibrateOptions(policy="fp32"))
    assert spec.checked_against.startswith("diffusers ")
    bundle = export_checkpoint(repository, "own", spec.spec_path).bundle
    manifest = read_manifest(bundle)
    assert manifest.scheduler["prediction_type"] == "v_prediction" and manifest.latent.scaling_factor == 0.3
    taken = {name for name, source in manifest.sources.items() if source == "checkpoint"}
    assert taken == {"scheduler", "tokenizer", "unet", "text_encoder", "vae"}
    report = run_gate(bundle, Options(threads=1), sources_of(bundle, repository, lambda: open_weights))
    assert report.passed, [check for check in report.checks if not check.passed]

    pipe.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(start_noise(5, (4, 8, 8)))[None]
    options: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 2.0}
    theirs = pipe(PROMPT, latents=noise, output_type="np", **options).images[0]
    ours = Pipeline(OrtEngine(bundle, threads=1)).image(PROMPT, steps=4, guidance=2.0, seed=5)
    assert psnr_db((theirs * 255).round().astype(np.uint8), ours, peak=255) >= 55


def test_the_gate_fails_a_bundle_when_the_checkpoint_s_scheduler_is_another_now(
    exported: tuple[Repository, dict[str, Any]], tmp_path: Path
) -> None:
    repository, results = exported
    root = tmp_path / "repo"
    for part in ("bases", "checkpoints"):
        shutil.copytree(repository.root / part, root / part)
    file = root / "bases" / "tiny" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    bundle = results["taq"].bundle
    sources = sources_of(bundle, Repository.open(root), lambda: open_weights)
    report = run_gate(bundle, Options(threads=1, level="integrity"), sources)
    (failed,) = report.failed
    assert failed.name == "scheduler is the checkpoint's"
    assert (
        "scheduler.prediction_type: must be 'v_prediction', got 'epsilon'; export the checkpoint again" in failed.reason
    )
