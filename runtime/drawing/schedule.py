"""The noise schedule of a base, made of its scheduler's settings. Pure functions; the samplers are in samplers.

Zero terminal SNR after Common Diffusion Noise Schedules and Sample Steps Are Flawed (Lin et al., WACV'24), algorithm 1.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from personalq.errors import EngineError, RepositoryError
from personalq.scheduler import sampler_of, settings_of

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a base. alphas_cumprod: (T,) float64 holding float32 values, as the model was trained with.

    final_alpha: alpha_bar after DDIM's last step. clip: largest magnitude of the predicted image, inf = not clipped.
    sampler: the one that draws as the base's own scheduler, else ddim. lcm_steps, lcm_scaling: the steps that an LCM was
    distilled with, and how its boundary scales time.
    """

    alphas_cumprod: npt.NDArray[np.float64]
    final_alpha: float
    prediction_type: str
    spacing: str
    steps_offset: int
    clip: float
    sampler: str = "ddim"
    lcm_steps: int = 50
    lcm_scaling: float = 10.0

    @property
    def n_train(self) -> int:
        return len(self.alphas_cumprod)


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Read a diffusers scheduler_config. Raises EngineError naming the field that cannot be obeyed."""
    try:
        settings = settings_of(config)
    except RepositoryError as error:
        raise EngineError(str(error)) from error
    alphas_cumprod = _alphas_cumprod(settings)
    return Schedule(
        alphas_cumprod=alphas_cumprod,
        final_alpha=1.0 if settings["set_alpha_to_one"] else float(alphas_cumprod[0]),
        prediction_type=settings["prediction_type"],
        spacing=settings["timestep_spacing"],
        steps_offset=settings["steps_offset"],
        clip=float(settings["clip_sample_range"]) if settings["clip_sample"] else math.inf,
        sampler=sampler_of(settings)[0],
        lcm_steps=settings.get("original_inference_steps", 50),
        lcm_scaling=float(settings.get("timestep_scaling", 10.0)),
    )


def _alphas_cumprod(settings: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """(T,) alpha_bar. Rounded to float32 where torch rounds it: the model was trained with those numbers."""
    betas = _betas(settings)
    alphas = np.float32(1) - (_zero_terminal_snr(betas) if settings["rescale_betas_zero_snr"] else betas)
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32).astype(np.float64)


def _betas(settings: Mapping[str, Any]) -> Array:
    if settings["trained_betas"] is not None:
        return np.asarray(settings["trained_betas"], dtype=np.float32)
    n, start, end = settings["num_train_timesteps"], settings["beta_start"], settings["beta_end"]
    if settings["beta_schedule"] == "linear":
        return np.linspace(start, end, n).astype(np.float32)
    if settings["beta_schedule"] == "scaled_linear":
        return np.asarray(np.linspace(start**0.5, end**0.5, n).astype(np.float32) ** 2)
    bar = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
    return np.asarray([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(n)], dtype=np.float32)


def _zero_terminal_snr(betas: Array) -> Array:
    """Shift and stretch sqrt(alpha_bar) so that its first value stays and its last is exactly 0."""
    root = np.sqrt(np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32))
    first, last = root[0], root[-1]
    bar = ((root - last) * (first / (first - last))) ** 2
    return np.asarray(np.float32(1) - np.concatenate([bar[:1], bar[1:] / bar[:-1]]), dtype=np.float32)
