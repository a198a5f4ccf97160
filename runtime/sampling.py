"""DDIM in numpy, obeying a base's own scheduler_config.json. Pure functions over arrays; it knows no engine or prompt.

Denoising Diffusion Implicit Models (Song et al., ICLR'21), eq. 12 with eta = 0, as diffusers' DDIMScheduler steps it;
zero terminal SNR after Common Diffusion Noise Schedules and Sample Steps Are Flawed (Lin et al., WACV'24), algorithm 1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import EngineError

Array = npt.NDArray[np.float32]
Steps = npt.NDArray[np.int64]

_LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "leading"}
_SAMPLER = {**_LINEAR, "timestep_spacing": "linspace"}
_KARRAS = {**_SAMPLER, "beta_start": 0.00085, "beta_end": 0.012}

# What each scheduler class assumes when its config does not say. Only DDIM (and DDPM) clip the predicted image: in
# latent space that is rarely wanted, so a config of another class that does not mention it does not get it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {**_LINEAR, "clip_sample": True},
    "DDPMScheduler": {**_LINEAR, "clip_sample": True},
    "PNDMScheduler": {**_LINEAR, "set_alpha_to_one": False},
    "LMSDiscreteScheduler": _SAMPLER,
    "EulerDiscreteScheduler": _SAMPLER,
    "EulerAncestralDiscreteScheduler": _SAMPLER,
    "DPMSolverMultistepScheduler": _SAMPLER,
    "DPMSolverSinglestepScheduler": _SAMPLER,
    "DEISMultistepScheduler": _SAMPLER,
    "UniPCMultistepScheduler": _SAMPLER,
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "LCMScheduler": {**_KARRAS, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"},
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a base. alphas_cumprod: (T,) float64 holding float32 values, as the model was trained with.

    final_alpha: alpha_bar after the last step. clip: largest magnitude of the predicted image, inf = not clipped.
    """

    alphas_cumprod: npt.NDArray[np.float64]
    final_alpha: float
    prediction_type: str
    spacing: str
    steps_offset: int
    clip: float

    @property
    def n_train(self) -> int:
        return len(self.alphas_cumprod)


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Read a diffusers scheduler_config. Raises EngineError naming the field that cannot be obeyed."""
    name = config.get("_class_name")
    if name not in DEFAULTS:
        raise EngineError(
            f"scheduler: _class_name: must be one of {', '.join(DEFAULTS)}, got {name!r}; use another base"
        )
    settings = {"set_alpha_to_one": True, "clip_sample": False, **DEFAULTS[name], **config}
    if settings.get("thresholding"):
        raise EngineError(
            "scheduler: thresholding: must be off, got on: it is meant for pixels, not latents; set false"
        )
    prediction_type = str(_one_of(settings.get("prediction_type", "epsilon"), "prediction_type", PREDICTION_TYPES))
    spacing = str(_one_of(settings["timestep_spacing"], "timestep_spacing", tuple(SPACINGS)))
    alphas_cumprod = _alphas_cumprod(settings)
    return Schedule(
        alphas_cumprod=alphas_cumprod,
        final_alpha=1.0 if settings["set_alpha_to_one"] else float(alphas_cumprod[0]),
        prediction_type=prediction_type,
        spacing=spacing,
        steps_offset=int(settings.get("steps_offset", 0)),
        clip=float(settings.get("clip_sample_range", 1.0)) if settings["clip_sample"] else math.inf,
    )


def timesteps(schedule: Schedule, n_steps: int) -> Steps:
    """(n_steps,) int64 time steps from noisy to clean. Raises EngineError when the schedule has no such steps."""
    if not 1 <= n_steps <= schedule.n_train:
        raise EngineError(f"steps: must be between 1 and {schedule.n_train}, got {n_steps}; choose another number")
    steps = SPACINGS[schedule.spacing](schedule, n_steps)
    if steps.max() >= schedule.n_train:
        raise EngineError(
            f"steps: must stay below time step {schedule.n_train}, got {steps.max()} "
            f"with steps_offset {schedule.steps_offset}; use fewer steps"
        )
    return steps


def predict(schedule: Schedule, t: int, x_t: Array, model_output: Array) -> tuple[Array, Array]:
    """The model's output at time step t -> (x_0, eps), shaped like x_t, float32. x_0 is clipped if the base asks."""
    alpha = float(schedule.alphas_cumprod[t])
    a, b = np.float32(math.sqrt(alpha)), np.float32(math.sqrt(1 - alpha))
    if schedule.prediction_type == "v_prediction":
        x_0, eps = a * x_t - b * model_output, a * model_output + b * x_t
    elif schedule.prediction_type == "sample":
        x_0, eps = model_output, (x_t - a * model_output) / b
    elif a > 0:
        x_0, eps = (x_t - b * model_output) / a, model_output
    else:
        raise EngineError(
            f"scheduler: prediction_type: must be v_prediction or sample at time step {t}, where nothing but noise is "
            "left (rescale_betas_zero_snr), got epsilon; fix the base's scheduler_config.json"
        )
    return np.clip(x_0, -schedule.clip, schedule.clip, dtype=np.float32), np.asarray(eps, dtype=np.float32)


def ddim_step(schedule: Schedule, n_steps: int, t: int, x_0: Array, eps: Array) -> Array:
    """x_t's prediction (x_0, eps) -> x at the next cleaner time step: sqrt(a') x_0 + sqrt(1 - a') eps (eq. 12)."""
    before = t - schedule.n_train // n_steps
    alpha = float(schedule.alphas_cumprod[before]) if before >= 0 else schedule.final_alpha
    return np.asarray(np.float32(math.sqrt(alpha)) * x_0 + np.float32(math.sqrt(1 - alpha)) * eps, dtype=np.float32)


def _leading(schedule: Schedule, n_steps: int) -> Steps:
    ratio = schedule.n_train // n_steps
    return np.arange(n_steps, dtype=np.int64)[::-1] * ratio + schedule.steps_offset


def _trailing(schedule: Schedule, n_steps: int) -> Steps:
    # arange may give one step too many (1000 / n is rarely exact): a time step below 0, which we drop.
    steps = np.round(np.arange(schedule.n_train, 0, -schedule.n_train / n_steps)).astype(np.int64) - 1
    return np.asarray(steps[:n_steps])


def _linspace(schedule: Schedule, n_steps: int) -> Steps:
    return np.linspace(0, schedule.n_train - 1, n_steps).round()[::-1].astype(np.int64)


SPACINGS: dict[str, Callable[[Schedule, int], Steps]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}


def _alphas_cumprod(settings: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """(T,) alpha_bar. Rounded to float32 where torch rounds it: the model was trained with those numbers."""
    betas = _betas(settings)
    alphas = np.float32(1) - (_zero_terminal_snr(betas) if settings.get("rescale_betas_zero_snr") else betas)
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32).astype(np.float64)


def _betas(settings: Mapping[str, Any]) -> Array:
    if settings.get("trained_betas") is not None:
        return np.asarray(settings["trained_betas"], dtype=np.float32)
    n, start, end = int(settings.get("num_train_timesteps", 1000)), settings["beta_start"], settings["beta_end"]
    kind = _one_of(settings["beta_schedule"], "beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"))
    if kind == "linear":
        return np.linspace(start, end, n).astype(np.float32)
    if kind == "scaled_linear":
        return np.asarray(np.linspace(start**0.5, end**0.5, n).astype(np.float32) ** 2)
    bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
    return np.asarray([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(n)], dtype=np.float32)


def _zero_terminal_snr(betas: Array) -> Array:
    """Shift and stretch sqrt(alpha_bar) so that its first value stays and its last is exactly 0."""
    root = np.sqrt(np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32))
    first, last = root[0], root[-1]
    bar = ((root - last) * (first / (first - last))) ** 2
    return np.asarray(np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]]), dtype=np.float32)


def _one_of(value: Any, field: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise EngineError(f"scheduler: {field}: must be one of {', '.join(allowed)}, got {value!r}; use another base")
    return value
