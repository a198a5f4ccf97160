"""The noise schedule of a base, read from its own scheduler_config.json. Pure functions; the samplers are in samplers.

Zero terminal SNR after Common Diffusion Noise Schedules and Sample Steps Are Flawed (Lin et al., WACV'24), algorithm 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import EngineError

Array = npt.NDArray[np.float32]

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
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a base. alphas_cumprod: (T,) float64 holding float32 values, as the model was trained with.

    final_alpha: alpha_bar after DDIM's last step. clip: largest magnitude of the predicted image, inf = not clipped.
    lcm_steps, lcm_scaling: the steps that an LCM was distilled with, and how its boundary scales time.
    """

    alphas_cumprod: npt.NDArray[np.float64]
    final_alpha: float
    prediction_type: str
    spacing: str
    steps_offset: int
    clip: float
    lcm_steps: int = 50
    lcm_scaling: float = 10.0

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
    spacing = str(_one_of(settings["timestep_spacing"], "timestep_spacing", SPACINGS))
    alphas_cumprod = _alphas_cumprod(settings)
    return Schedule(
        alphas_cumprod=alphas_cumprod,
        final_alpha=1.0 if settings["set_alpha_to_one"] else float(alphas_cumprod[0]),
        prediction_type=prediction_type,
        spacing=spacing,
        steps_offset=int(settings.get("steps_offset", 0)),
        clip=float(settings.get("clip_sample_range", 1.0)) if settings["clip_sample"] else math.inf,
        lcm_steps=int(settings.get("original_inference_steps", 50)),
        lcm_scaling=float(settings.get("timestep_scaling", 10.0)),
    )


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
