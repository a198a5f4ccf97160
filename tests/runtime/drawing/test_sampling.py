"""The noise schedule is the one that diffusers reads from the same scheduler_config.json."""

import math
from typing import Any

import numpy as np
import pytest

from personalq.errors import EngineError
from personalq.scheduler import CLASSES
from runtime.drawing.schedule import schedule_from_config

BASE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


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
    for name in CLASSES:
        scheduler = getattr(theirs, name)()
        schedule = schedule_from_config({"_class_name": name})
        assert np.allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod.numpy(), atol=1e-6), name
        assert schedule.spacing == scheduler.config.get("timestep_spacing", schedule.spacing), name


def test_zero_terminal_snr_ends_in_pure_noise() -> None:
    config = {**BASE, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert schedule_from_config(config).alphas_cumprod[-1] == 0
    assert schedule_from_config(BASE).alphas_cumprod[-1] > 0.004


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
