"""Every numpy sampler takes the steps that diffusers' scheduler takes, for every base's own configuration."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.errors import EngineError
from runtime.drawing.samplers import SAMPLERS, plan_steps, predict
from runtime.drawing.schedule import Schedule, schedule_from_config
from tests.runtime.drawing.runs import own_run, their_run

GOLDENS = Path(__file__).parents[2] / "data" / "sampler_goldens.json"
BASE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
# float32 rounding of coefficients; an eps step divides by sqrt(alpha_bar), about 1/15 at the noisy end. The second-order
# step divides differences of x_0 by log-SNR differences, and diffusers keeps its sigmas in float32.
STEP_TOLERANCE = 1e-5
FLOAT32 = 4e-7  # a few roundings of numbers near 1

VARIANTS: dict[str, dict[str, Any]] = {
    "stable diffusion": {"steps_offset": 1, "set_alpha_to_one": False},
    "linear betas": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine betas": {"beta_schedule": "squaredcos_cap_v2"},
    "trained betas": {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
    "clipped": {"clip_sample": True, "clip_sample_range": 1.5},
    "zero terminal SNR": {"rescale_betas_zero_snr": True},
    "few training steps": {"num_train_timesteps": 100},
}
# Sampler -> (diffusers' class, what it is told).
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {"original_inference_steps": 50}),
}


# DDIM, the default, with every variant; the others with those that change more than a number.
CASES = [
    pytest.param(
        name,
        {**BASE, **variant, "prediction_type": kind, "timestep_spacing": spacing},
        id=f"{name}, {title}, {kind}, {spacing}",
    )
    for name, (title, variant), kind, spacing in product(
        THEIRS, VARIANTS.items(), ("epsilon", "v_prediction", "sample"), ("leading", "trailing", "linspace")
    )
    if (name == "ddim" or (title in ("stable diffusion", "cosine betas", "zero terminal SNR") and kind != "sample"))
    # Refused, see below: eps cannot start from pure noise.
    and not (title == "zero terminal SNR" and kind == "epsilon" and (name == "lcm" or spacing != "leading"))
    and not (title == "zero terminal SNR" and name == "pndm")  # diffusers' class knows no such thing
    # On purpose: diffusers cuts off these time steps where it rounds all others.
    and not (title == "cosine betas" and name == "dpmpp_2m_karras")
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_step_is_that_of_diffusers(name: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = schedule_from_config(config)
    for n in (1, 7, 20) if name in ("ddim", "pndm") else (7, 20) if name.startswith("dpm") else (1, 7):
        times, theirs = their_run(their_scheduler(name, config), n, monkeypatch)
        mine_times, mine = own_run(name, schedule, n, theirs)
        assert np.allclose(mine_times, times[: len(mine_times)], atol=1e-4)
        lost = [0.0, *(FLOAT32 * s for s in noise_levels(name, schedule, n))]
        for ours, expected, more in zip(mine, theirs, lost, strict=True):
            assert np.abs(ours - expected).max() <= STEP_TOLERANCE * max(1.0, float(np.abs(expected).max())) + more


def their_scheduler(name: str, config: dict[str, Any]) -> Any:
    diffusers = pytest.importorskip("diffusers")
    kind, told = THEIRS[name]
    return getattr(diffusers, kind).from_config({"set_alpha_to_one": True, **config, "_class_name": kind, **told})


def noise_levels(name: str, schedule: Schedule, n: int) -> list[float]:
    """sigma / alpha where each step starts and diffusers computes with it in float32, else 0 (DDIM, LCM)."""
    plan = plan_steps(name, schedule, n)
    if name in ("ddim", "lcm"):
        return [0.0] * n
    levels = plan.sigma / plan.alpha
    if name == "pndm":
        levels[1:2] = levels[0]  # the second step starts where the first did
    return list(levels)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_run_is_pinned_where_diffusers_is_not_installed(name: str) -> None:
    golden = json.loads(GOLDENS.read_text())[name]
    for kind, expected in golden.items():
        config = {**BASE, "prediction_type": kind, "steps_offset": 1, "timestep_spacing": "leading"}
        times, latents = own_run(name, schedule_from_config(config), 6)
        assert times == pytest.approx(expected["times"])
        assert [float(x.ravel()[5]) for x in latents] == pytest.approx(expected["latents"], rel=2e-4, abs=2e-5)


def test_no_spacing_gives_more_steps_than_asked() -> None:
    for spacing in ("leading", "trailing", "linspace"):
        schedule = schedule_from_config({**BASE, "timestep_spacing": spacing})
        for n in (1, 25, 61, 103, 1000):
            steps = plan_steps("ddim", schedule, n).times
            assert len(steps) == n and steps.min() >= 0 and (np.diff(steps) < 0).all()


def test_epsilon_cannot_start_from_pure_noise() -> None:
    schedule = schedule_from_config({**BASE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    x = np.ones((4, 2, 2), np.float32)
    with pytest.raises(EngineError) as error:
        predict(schedule, plan_steps("ddim", schedule, 4), 0, x, x, math.inf)
    assert str(error.value) == (
        "scheduler: prediction_type: must be v_prediction or sample at time step 999, where nothing but noise is left "
        "(rescale_betas_zero_snr), got epsilon; fix the base's scheduler_config.json"
    )


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_a_number_of_steps_outside_the_schedule_is_refused(n: int) -> None:
    with pytest.raises(EngineError) as error:
        plan_steps("ddim", schedule_from_config(BASE), n)
    assert str(error.value) == f"steps: must be between 1 and 1000, got {n}; choose another number"


def test_an_offset_beyond_the_schedule_is_refused() -> None:
    with pytest.raises(EngineError) as error:
        plan_steps("ddim", schedule_from_config({**BASE, "steps_offset": 1}), 1000)
    expected = "steps: must stay below time step 1000, got 1000 with steps_offset 1; use fewer steps"
    assert str(error.value) == expected


def test_lcm_has_no_more_steps_than_it_was_distilled_with() -> None:
    with pytest.raises(EngineError) as error:
        plan_steps("lcm", schedule_from_config(BASE), 51)
    assert str(error.value) == "steps: must be at most 50 with sampler lcm, got 51; 4 to 8 is usual"


def test_an_unknown_sampler_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match=r"^sampler: must be one of ddim, .*, got 'plms'; choose one of them$"):
        plan_steps("plms", schedule_from_config(BASE), 4)
