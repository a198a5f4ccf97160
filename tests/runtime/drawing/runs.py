"""One run of a sampler over a stand-in model, by the runtime and by diffusers."""

import math
from typing import Any

import numpy as np
import pytest

from runtime.drawing.samplers import SAMPLERS, Trail, plan_steps, predict
from runtime.drawing.schedule import Schedule


def model(x: np.ndarray, t: int) -> np.ndarray:
    """Something smooth that stands for a UNet: bounded, depends on x and t."""
    return np.tanh(x * np.float32(0.7) + np.float32(math.sin(t))).astype(np.float32)


def own_run(
    name: str, schedule: Schedule, n: int, theirs: list[np.ndarray] | None = None
) -> tuple[list[float], list[np.ndarray]]:
    """Times and latents of a run from seeded noise; each step starts from `theirs` where they are given."""
    plan, trail = plan_steps(name, schedule, n), Trail()
    clip = schedule.clip if SAMPLERS[name].clips else math.inf
    x = np.random.default_rng(n).standard_normal((1, 4, 4, 4)).astype(np.float32) * np.float32(plan.start_scale)
    latents = [x]
    for i in range(len(plan)):
        x = x if theirs is None else theirs[i]
        said = predict(schedule, plan, i, x, model(x, plan.times[i]), clip)
        x = SAMPLERS[name].step(schedule, plan, i, x, said, step_noise(i), trail)
        assert x.dtype == np.float32
        latents.append(x)
    return plan.times.tolist(), latents


def step_noise(i: int) -> np.ndarray:
    return np.random.default_rng([7, i]).standard_normal((1, 4, 4, 4)).astype(np.float32)


def their_run(theirs: Any, n: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[np.ndarray]]:
    """The same run by a scheduler of diffusers: each step is fed with its own latents and the stand-in's output on them."""
    import torch

    theirs.set_timesteps(n)
    fresh = iter(range(n))
    module = __import__(type(theirs).__module__, fromlist=["x"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(step_noise(next(fresh))))
    start = np.random.default_rng(n).standard_normal((1, 4, 4, 4)).astype(np.float32)
    x = torch.from_numpy(start) * theirs.init_noise_sigma
    latents = []
    for t in theirs.timesteps[: n + (type(theirs).__name__ == "PNDMScheduler" and n > 1)]:
        seen = theirs.scale_model_input(x, t)
        latents.append(seen.numpy())
        output = torch.from_numpy(model(seen.numpy(), float(t)))
        x = theirs.step(output, t, x).prev_sample
    return theirs.timesteps.tolist(), [*latents, x.numpy()]
