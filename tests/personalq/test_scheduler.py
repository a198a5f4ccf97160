"""A scheduler_config says everything once it is read; what it says is what diffusers takes, and the rest is said or refused."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from personalq.errors import RepositoryError
from personalq.scheduler import CLASSES, BaseScheduler, resolve_scheduler, sampler_of, settings_of

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PNDM = {"_class_name": "PNDMScheduler", **BETAS, "skip_prk_steps": True}


def resolve(config: dict[str, Any], index: dict[str, Any] | None = None, *, is_xl: bool = False) -> BaseScheduler:
    return resolve_scheduler(config, index or {}, is_xl=is_xl, where="base")


@pytest.mark.parametrize("name", CLASSES)
def test_a_field_that_is_left_out_has_the_default_of_its_class(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    settings = settings_of({"_class_name": name})
    theirs = {field: parameters[field].default for field in settings if field in parameters}
    assert {field: settings[field] for field in theirs} == theirs
    assert settings == settings_of({"_class_name": name, **dict.fromkeys(theirs)}), "null is left out"
    assert settings == settings_of(settings)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("saved", ["as saved today", "stripped"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_base_has_the_settings_that_diffusers_pipeline_has(name: str, saved: str, tmp_path: Path) -> None:
    """StableDiffusionPipeline overrules steps_offset and clip_sample; SDXL's does not."""
    diffusers = pytest.importorskip("diffusers")
    kind = getattr(diffusers, name)
    kind().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    config = written if saved == "as saved today" else {"_class_name": name}
    read = resolve(config)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    pipe = diffusers.StableDiffusionPipeline(**nothing, scheduler=kind(), requires_safety_checker=False)
    theirs = dict(pipe.scheduler.config)
    if theirs.get("timestep_spacing") != "leading":
        theirs.pop("steps_offset", None)  # has no meaning there
    assert {k: v for k, v in theirs.items() if k in read.settings} == {
        k: v for k, v in read.settings.items() if k in theirs
    }
    plain = dict(kind().config)
    xl = resolve(config, is_xl=True).settings
    assert {k: v for k, v in plain.items() if k in xl} == {k: v for k, v in xl.items() if k in plain}
    assert not any("not used" in note for note in read.notes)


def test_what_is_not_as_the_file_says_is_said() -> None:
    config = {"_class_name": "DDIMScheduler", **BETAS, "colour": 1}
    overruled = "counts as {}, as in diffusers' StableDiffusionPipeline"
    assert resolve(config).notes == (
        f"scheduler: clip_sample True {overruled.format(False)}",
        f"scheduler: steps_offset 0 {overruled.format(1)}",
        "scheduler: not used, no scheduler knows it: colour",
    )
    said = {**PNDM, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    assert resolve(said).notes == ()


def test_the_class_is_the_one_that_model_index_names() -> None:
    index = {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    assert resolve(PNDM, index, is_xl=True).sampler == "euler"
    assert resolve(PNDM, {"scheduler": [None, None]}, is_xl=True).sampler == "pndm"


def test_every_setting_is_in_the_hash() -> None:
    read = [resolve({**PNDM, "steps_offset": n}, is_xl=True).sha256() for n in (0, 1, 0)]
    assert read[0] == read[2] != read[1]


@pytest.mark.parametrize(
    ("config", "sampler", "why"),
    [
        ({"_class_name": "DDIMScheduler"}, "ddim", ""),
        (PNDM, "pndm", ""),
        ({"_class_name": "PNDMScheduler"}, "ddim", "PNDMScheduler with skip_prk_steps False"),
        ({**PNDM, "prediction_type": "sample"}, "ddim", "PNDMScheduler with prediction_type 'sample'"),
        ({"_class_name": "EulerDiscreteScheduler"}, "euler", ""),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
            "ddim",
            "EulerDiscreteScheduler with use_karras_sigmas True",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"},
            "ddim",
            "EulerDiscreteScheduler with final_sigmas_type 'sigma_min'",
        ),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "euler_a", ""),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_type": "bh2"}, "dpmpp_2m", ""),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "dpmpp_2m_karras", ""),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "ddim",
            "DPMSolverMultistepScheduler with algorithm_type 'sde-dpmsolver++'",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_beta_sigmas": True},
            "ddim",
            "DPMSolverMultistepScheduler with use_beta_sigmas True",
        ),
        ({"_class_name": "LCMScheduler"}, "lcm", ""),
        ({"_class_name": "UniPCMultistepScheduler"}, "ddim", "UniPCMultistepScheduler"),
        ({"_class_name": "DDPMScheduler"}, "ddim", "DDPMScheduler"),
    ],
)
def test_a_base_is_drawn_by_its_own_sampler_or_by_ddim_and_the_reason_is_said(
    config: dict[str, Any], sampler: str, why: str
) -> None:
    line = f"scheduler: no sampler here draws as {why}; ddim draws, with the base's noise schedule" if why else ""
    assert sampler_of(settings_of(config)) == (sampler, line)


def test_old_versions_words_are_read() -> None:
    assert settings_of({"_class_name": "DDPMScheduler", "predict_epsilon": False})["prediction_type"] == "sample"
    assert settings_of({**PNDM, "predict_epsilon": True, "tensor_format": "pt"}) == settings_of(PNDM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "_class_name: must be one of DDIMScheduler, "),
        ({"_class_name": ["PNDMScheduler"]}, "_class_name: must be one of DDIMScheduler, "),
        ({"thresholding": True}, "thresholding: must be off, got on: it is meant for pixels, not latents; set false"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps: must be 1 to 100000, got 1000000000; use another base"),
        ({"beta_start": "0.1"}, "beta_start: must be a number between 0 and 1, got '0.1'; use another base"),
        ({"beta_end": float("nan")}, "beta_end: must be a number between 0 and 1, got nan; use another base"),
        ({"trained_betas": [0.1, "x"]}, "trained_betas: must be a list of numbers from 0 to 1, got [0.1, 'x']; use"),
        (
            {"trained_betas": [0.1]},
            "trained_betas: must be num_train_timesteps (1000) numbers, got 1; use another base",
        ),
        ({"steps_offset": -1}, "steps_offset: must be 0 to 100000, got -1; use another base"),
        ({"clip_sample": "no"}, "clip_sample: must be true or false, got 'no'; use another base"),
        ({"clip_sample_range": 0}, "clip_sample_range: must be a number above 0, got 0; use another base"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule: must be one of linear, scaled_linear, squaredcos_cap_v2, got"),
        ({"timestep_spacing": {}}, "timestep_spacing: must be one of leading, trailing, linspace, got {}; use another"),
    ],
)
def test_a_value_that_cannot_be_obeyed_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RepositoryError) as error:
        resolve({**PNDM, **changes})
    assert str(error.value).startswith(f"base: scheduler: {message}") and "\n" not in str(error.value)
