"""A base with any scheduler of diffusers, saved today or by an old version: calibrated, exported, and equal to diffusers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from calibration.calibrate import CalibrateOptions, calibrate
from exporters.export import export_checkpoint
from personalq.bundle import read_manifest
from personalq.repository import Repository
from personalq.scheduler import CLASSES
from runtime.drawing.schedule import schedule_from_config
from runtime.gate import verify_bundle

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' schedulers on numpy 2
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {**BETAS, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
OWN = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "LCMScheduler": "lcm",
}
# What old versions wrote: the betas, and nothing of what came later. PNDM in its first form too, as Stable Diffusion 1.4 has it.
OLD = {name: (name, BETAS, OWN.get(name, "ddim")) for name in CLASSES}
FRESH: dict[str, tuple[str, dict[str, Any], str]] = {
    "PNDM, as Stable Diffusion 1.5": (
        "PNDMScheduler",
        {**BETAS, "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False},
        "pndm",
    ),
    "Euler, as SDXL": ("EulerDiscreteScheduler", {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}, "euler"),
    "DPM-Solver++ with Karras' sigmas": (
        "DPMSolverMultistepScheduler",
        {**BETAS, "use_karras_sigmas": True},
        "dpmpp_2m_karras",
    ),
    "DDIM, zero terminal SNR": ("DDIMScheduler", ZERO_SNR, "ddim"),
    "Euler, zero terminal SNR": ("EulerDiscreteScheduler", ZERO_SNR, "euler"),
    "UniPC, v-prediction": ("UniPCMultistepScheduler", {**BETAS, "prediction_type": "v_prediction"}, "ddim"),
    "Heun, untouched": ("HeunDiscreteScheduler", {}, "ddim"),
    "DDPM, untouched": ("DDPMScheduler", {}, "ddim"),
}


@pytest.fixture(scope="module")
def repository(exported, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A copy whose base's scheduler is changed from test to test."""
    return Repository.open(shutil.copytree(exported[0].root, tmp_path_factory.mktemp("schedulers") / "repository"))


def give(repository: Repository, name: str, config: dict[str, Any]) -> None:
    base = repository.root / "bases" / "tiny"
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))


def require_equal_to_diffusers(repository: Repository, sampler: str) -> None:
    with pytest.MonkeyPatch.context() as patch:  # weights are compared elsewhere
        patch.setattr("calibration.calibrate.checked_against", lambda *_: "not compared here")
        spec = calibrate(repository, "rex", CalibrateOptions(policy="fp32"))
    bundle = export_checkpoint(repository, "rex", spec.spec_path).bundle
    report = verify_bundle(bundle)
    assert report.passed, [check for check in report.checks if not check.passed]
    values = {check.name: check.value for check in report.checks}
    assert values["scheduler step SNR dB"] > 100 and values["image PSNR dB, worst"] >= 60
    assert schedule_from_config(read_manifest(bundle).scheduler).sampler == sampler


@pytest.mark.parametrize(("name", "config", "sampler"), OLD.values(), ids=OLD)
def test_a_base_of_an_old_version_draws_as_in_diffusers(repository, name: str, config: dict[str, Any], sampler: str):
    give(repository, name, config)
    require_equal_to_diffusers(repository, sampler)


@pytest.mark.parametrize(("name", "config", "sampler"), FRESH.values(), ids=FRESH)
def test_a_base_saved_today_draws_as_in_diffusers(
    repository, tmp_path: Path, name: str, config: dict[str, Any], sampler: str
):
    import diffusers

    getattr(diffusers, name)(**config).save_pretrained(tmp_path)
    give(repository, name, json.loads((tmp_path / "scheduler_config.json").read_text()))
    require_equal_to_diffusers(repository, sampler)
