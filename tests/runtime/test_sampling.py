"""The numpy DDIM takes the steps that diffusers' DDIMScheduler takes, for every base's own configuration."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest

from personalq.errors import EngineError
from runtime.sampling import DEFAULTS, ddim_step, predict, schedule_from_config, timesteps

BASE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
# float32 rounding of coefficients; an eps step divides by sqrt(alpha_bar), about 1/15 at the noisy end.
STEP_TOLERANCE = 1e-5

VARIANTS: dict[str, dict[str, Any]] = {
    "stable diffusion": {"steps_offset": 1, "set_alpha_to_one": False},
    "linear betas": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine betas": {"beta_schedule": "squaredcos_cap_v2"},
    "trained betas": {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
    "clipped": {"clip_sample": True, "clip_sample_range": 1.5},
    "zero terminal SNR": {"rescale_betas_zero_snr": True},
    "few training steps": {"num_train_timesteps": 100},
}
CASES = [
    pytest.param(
        {**BASE, **variant, "prediction_type": kind, "timestep_spacing": spacing}, id=f"{name}, {kind}, {spacing}"
    )
    for (name, variant), kind, spacing in product(
        VARIANTS.items(), ("epsilon", "v_prediction", "sample"), ("leading", "trailing", "linspace")
    )
    if not (kind == "epsilon" and name == "zero terminal SNR" and spacing != "leading")  # refused, see below
]


def model(x: np.ndarray, t: int) -> np.ndarray:
    """Something smooth that stands for a UNet: bounded, depends on x and t."""
    return np.tanh(x * np.float32(0.7) + np.float32(math.sin(t))).astype(np.float32)


@pytest.mark.parametrize("config", CASES)
def test_every_step_is_that_of_diffusers(config: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    theirs = scheduling.DDIMScheduler.from_config(config)
    schedule = schedule_from_config(config)
    for n in (1, 7, 20):
        theirs.set_timesteps(n)
        steps = timesteps(schedule, n)
        assert steps.tolist() == theirs.timesteps.tolist()
        x = np.random.default_rng(n).standard_normal((4, 4, 4)).astype(np.float32)
        for t in steps.tolist():
            output = model(x, t)
            expected = theirs.step(torch.from_numpy(output), t, torch.from_numpy(x)).prev_sample.numpy()
            x_0, eps = predict(schedule, t, x, output)
            x = ddim_step(schedule, n, t, x_0, eps)
            assert x.dtype == np.float32
            assert np.abs(x - expected).max() <= STEP_TOLERANCE * max(1.0, float(np.abs(expected).max()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_other_schedulers_lend_their_betas_and_spacing(name: str) -> None:
    theirs = pytest.importorskip("diffusers")
    config = {**BASE, "_class_name": name}
    del config["clip_sample"]
    schedule = schedule_from_config(config)
    scheduler = getattr(theirs, name).from_config(config)
    assert schedule.spacing == scheduler.config.timestep_spacing
    assert np.allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), atol=1e-7)
    assert schedule.clip == math.inf


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' other schedulers on numpy 2
def test_defaults_are_those_of_diffusers() -> None:
    theirs = pytest.importorskip("diffusers")
    for name in DEFAULTS:
        scheduler = getattr(theirs, name)()
        schedule = schedule_from_config({"_class_name": name})
        assert np.allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), atol=1e-6), name
        assert schedule.spacing == scheduler.config.get("timestep_spacing", schedule.spacing), name


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    config = {**BASE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert schedule_from_config(config).alphas_cumprod[-1] == 0
    assert schedule_from_config(BASE).alphas_cumprod[-1] > 0.004


def test_no_spacing_gives_more_steps_than_asked() -> None:
    for spacing in ("leading", "trailing", "linspace"):
        schedule = schedule_from_config({**BASE, "timestep_spacing": spacing})
        for n in (1, 25, 61, 103, 1000):
            steps = timesteps(schedule, n)
            assert len(steps) == n and steps.min() >= 0 and (np.diff(steps) < 0).all()


def test_epsilon_cannot_start_from_pure_noise() -> None:
    schedule = schedule_from_config({**BASE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    x = np.ones((4, 2, 2), np.float32)
    with pytest.raises(EngineError) as error:
        predict(schedule, 999, x, x)
    assert str(error.value) == (
        "scheduler: prediction_type: must be v_prediction or sample at time step 999, where nothing but noise is left "
        "(rescale_betas_zero_snr), got epsilon; fix the base's scheduler_config.json"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {**BASE, "_class_name": "FlowMatchEulerDiscreteScheduler"},
            r"scheduler: _class_name: must be one of DDIMScheduler, .*, got 'FlowMatchEulerDiscreteScheduler'; use",
        ),
        ({}, r"scheduler: _class_name: must be one of .*, got None; use another base"),
        ({**BASE, "thresholding": True}, "scheduler: thresholding: must be off, got on: it is meant for pixels"),
        (
            {**BASE, "prediction_type": "flow"},
            "scheduler: prediction_type: must be one of epsilon, v_prediction, sample",
        ),
        ({**BASE, "beta_schedule": "sigmoid"}, "scheduler: beta_schedule: must be one of linear, .*, got 'sigmoid'"),
        ({**BASE, "timestep_spacing": "even"}, "scheduler: timestep_spacing: must be one of leading, .*, got 'even'"),
    ],
    ids=["unknown class", "no class", "thresholding", "prediction type", "betas", "spacing"],
)
def test_what_cannot_be_obeyed_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        schedule_from_config(config)


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_a_number_of_steps_outside_the_schedule_is_refused(n: int) -> None:
    with pytest.raises(EngineError) as error:
        timesteps(schedule_from_config(BASE), n)
    assert str(error.value) == f"steps: must be between 1 and 1000, got {n}; choose another number"


def test_an_offset_beyond_the_schedule_is_refused() -> None:
    with pytest.raises(EngineError) as error:
        timesteps(schedule_from_config({**BASE, "steps_offset": 1}), 1000)
    expected = "steps: must stay below time step 1000, got 1000 with steps_offset 1; use fewer steps"
    assert str(error.value) == expected
