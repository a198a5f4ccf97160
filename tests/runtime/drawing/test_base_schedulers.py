"""A base draws as diffusers' class of its scheduler does, or as DDIM over its noise schedule, whoever wrote its config."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalq.scheduler import CLASSES
from runtime.drawing.samplers import plan_steps
from runtime.drawing.schedule import schedule_from_config
from tests.runtime.drawing.runs import own_run, their_run

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # diffusers' own, numpy 2

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {**STABLE_DIFFUSION, "prediction_type": "v_prediction"}
# What a base says; each class is told of it what its __init__ takes, as `save_pretrained` or an old version would write it.
BASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "betas": STABLE_DIFFUSION,
    "Stable Diffusion": {**STABLE_DIFFUSION, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False},
    "cosine, v": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False},
    "leading, v": {**V, "timestep_spacing": "leading", "steps_offset": 1},
    "linspace": {**STABLE_DIFFUSION, "timestep_spacing": "linspace", "clip_sample": True, "clip_sample_range": 1.5},
    "trailing, zero SNR, v": {**V, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    "trained betas": {"trained_betas": np.linspace(0.001, 0.02, 500).tolist(), "num_train_timesteps": 500},
}
DRAWN_AS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "LCMScheduler": "lcm",
}
TOLERANCE = 1e-5  # a whole run, float32 on both sides
STEPS = 7


def told(name: str, base: dict[str, Any]) -> dict[str, Any]:
    """The fields of `base` that diffusers' class takes; PNDM as Stable Diffusion uses it."""
    diffusers = pytest.importorskip("diffusers")
    taken = diffusers.DDIMScheduler._get_init_keys(getattr(diffusers, name))
    return {k: v for k, v in {**base, "skip_prk_steps": True}.items() if k in taken}


def written(name: str, config: dict[str, Any], folder: Path, *, fresh: bool) -> dict[str, Any]:
    """scheduler_config.json as today's diffusers saves it, or with nothing but what was said."""
    import diffusers

    if not fresh:
        return {"_class_name": name, "_diffusers_version": "0.2.0", **config}
    getattr(diffusers, name)(**config).save_pretrained(folder)
    found: dict[str, Any] = json.loads((folder / "scheduler_config.json").read_text())
    return found


def ddim_over(theirs: Any) -> Any:
    """diffusers' DDIM with the noise schedule that another scheduler has; it clips only if that one says so."""
    from diffusers import DDIMScheduler

    taken = {k: v for k, v in theirs.config.items() if k in DDIMScheduler._get_init_keys(DDIMScheduler)}
    spacing = {"timestep_spacing": "linspace"}  # of the one class that has no field for it
    return DDIMScheduler(**{"clip_sample": False, **spacing, **taken})


@pytest.mark.parametrize("fresh", [True, False], ids=["saved today", "stripped"])
@pytest.mark.parametrize(("name", "base"), list(product(CLASSES, BASES)), ids=str)
def test_a_run_is_that_of_diffusers(
    name: str, base: str, fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    config = told(name, BASES[base])
    schedule = schedule_from_config(written(name, config, tmp_path, fresh=fresh))
    theirs = getattr(diffusers, name)(**config)
    assert np.allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), atol=1e-6)
    assert schedule.sampler == DRAWN_AS.get(name, "ddim")
    theirs = theirs if name in DRAWN_AS else ddim_over(theirs)
    times, expected = their_run(theirs, STEPS, monkeypatch)
    mine_times, mine = own_run(schedule.sampler, schedule, STEPS)
    assert np.allclose(mine_times, times[: len(mine_times)], atol=1e-3)
    allowed = TOLERANCE
    if schedule.sampler.startswith("euler"):  # x / alpha in diffusers: 4096 and more where nothing but noise is left
        plan = plan_steps(schedule.sampler, schedule, STEPS)
        allowed += 2.0**-24 * float((plan.sigma / plan.alpha).max())
    for ours, other in zip(mine, expected, strict=True):
        assert np.abs(ours - other).max() <= allowed * max(1.0, float(np.abs(other).max()))
