"""A base's scheduler_config.json, read once for every room: each field said, and what nobody could obey refused.

Old versions of diffusers left fields out, and every class has other defaults for them. A field that is left out means the
default of the class that the base names, as it does for diffusers when it draws with that class; calibration, goldens
and the runtime all start from what `settings_of` says.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import RepositoryError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
LONGEST = 100_000  # training steps; every scheduler in use has 1000
FALLBACK = "ddim"
NOISY = ("euler_a", "lcm")  # samplers whose steps draw noise

# What all classes read, and what most of them take where a config does not say.
_NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "thresholding": False,
}
_SPACED = {"timestep_spacing": "linspace"}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_KARRAS = {**_SPACED, "beta_start": 0.00085, "beta_end": 0.012}
_EULER = {"interpolation_type": "linear", "timestep_type": "discrete", "sigma_min": None, "sigma_max": None}
_DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "variance_type": None}
_FLOW = {"use_lu_lambdas": False, "use_flow_sigmas": False}
_CONSISTENCY = {**_KARRAS, "beta_schedule": "scaled_linear", "timestep_spacing": "leading"}

# What each class reads besides, or takes otherwise. Only DDIM and DDPM clip the predicted image unless told not to.
CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "PNDMScheduler": {"set_alpha_to_one": False, "skip_prk_steps": False},
    "LMSDiscreteScheduler": _SPACED,
    "EulerDiscreteScheduler": {**_SPACED, **_SIGMAS, **_EULER, "final_sigmas_type": "zero"},
    "EulerAncestralDiscreteScheduler": _SPACED,
    "DPMSolverMultistepScheduler": {**_SPACED, **_SIGMAS, **_DPM, **_FLOW, "final_sigmas_type": "zero"},
    "DPMSolverSinglestepScheduler": _SPACED,
    "DEISMultistepScheduler": _SPACED,
    "UniPCMultistepScheduler": _SPACED,
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "SASolverScheduler": _SPACED,
    "LCMScheduler": {**_CONSISTENCY, "original_inference_steps": 50, "timestep_scaling": 10.0},
    "TCDScheduler": _CONSISTENCY,
}

# Class -> its sampler here, and what each field must be for that sampler to draw what the class draws.
OWN: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
    "DDIMScheduler": ("ddim", {}),
    "PNDMScheduler": (
        "pndm",
        {"skip_prk_steps": (True,), "rescale_betas_zero_snr": (False,), "prediction_type": PREDICTION_TYPES[:2]},
    ),
    "EulerDiscreteScheduler": (
        "euler",
        {
            **{name: (False,) for name in _SIGMAS},
            **{name: (_EULER[name],) for name in ("interpolation_type", "timestep_type")},
            "final_sigmas_type": ("zero",),
        },
    ),
    "EulerAncestralDiscreteScheduler": ("euler_a", {}),
    "DPMSolverMultistepScheduler": (
        "dpmpp_2m",
        {
            # diffusers turns DEIS' and UniPC's words for these two into its own
            "algorithm_type": ("dpmsolver++", "deis"),
            "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
            "solver_order": (2,),
            "variance_type": (None,),
            "use_karras_sigmas": (False, True),
            **{name: (False,) for name in ("use_exponential_sigmas", "use_beta_sigmas", *_FLOW)},
            "final_sigmas_type": ("zero",),
        },
    ),
    "LCMScheduler": ("lcm", {}),
}
DDIM_FIELDS = tuple(name for name in _NOISE if name != "thresholding")  # what diffusers' DDIMScheduler takes


@dataclass(frozen=True)
class BaseScheduler:
    """settings: every field said. sampler: who draws unless another is asked for. notes: what is not as the file says."""

    settings: dict[str, Any]
    sampler: str
    notes: tuple[str, ...]

    def sha256(self) -> str:
        """Of everything that pictures depend on."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


def resolve_scheduler(config: Mapping[str, Any], index: Mapping[str, Any], *, is_xl: bool, where: str) -> BaseScheduler:
    """A scheduler_config as the diffusers pipeline with this model_index.json has it. Raises RepositoryError.

    model_index.json names the class that diffusers makes. StableDiffusionPipeline takes a steps_offset that is not 1 for 1,
    and clips no latents: its first configs said neither. SDXL's pipeline takes both as they are.
    """
    named = index.get("scheduler")
    if isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
        config = {**config, "_class_name": named[1]}
    try:
        settings = settings_of(config)
    except RepositoryError as error:
        raise RepositoryError(f"{where}: {error}") from error
    notes = [] if is_xl else _overrule(settings)
    sampler, why = sampler_of(settings)
    return BaseScheduler(settings, sampler, tuple(filter(None, (*notes, why, _unread(config)))))


def _overrule(settings: dict[str, Any]) -> list[str]:
    """Change settings to what StableDiffusionPipeline makes of them; one line for each change."""
    told: dict[str, Any] = {"clip_sample": False}
    if settings["timestep_spacing"] == "leading":  # the other spacings have no offset
        told["steps_offset"] = 1
    changed = {field: value for field, value in told.items() if settings[field] != value}
    notes = [
        f"scheduler: {field} {settings[field]!r} counts as {value!r}, as in diffusers' StableDiffusionPipeline"
        for field, value in changed.items()
    ]
    settings.update(changed)
    return notes


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config with every field said, the class's own default where it says nothing or null.

    Raises RepositoryError, naming the field, for a class that is not known and a value that cannot be obeyed.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise RepositoryError(
            f"scheduler: _class_name: must be one of {', '.join(CLASSES)}, got {name!r}; use another base"
        )
    defaults = {**_NOISE, **CLASSES[name]}
    said = {field: config[field] for field in defaults if config.get(field) is not None}
    if config.get("predict_epsilon") is False and "prediction_type" not in said:
        said["prediction_type"] = "sample"  # as old versions wrote it
    for field, value in said.items():
        _check(field, value)
    settings = {"_class_name": name, **defaults, **said}
    if settings["trained_betas"] is not None and len(settings["trained_betas"]) != settings["num_train_timesteps"]:
        raise RepositoryError(
            f"scheduler: trained_betas: must be num_train_timesteps ({settings['num_train_timesteps']}) numbers, "
            f"got {len(settings['trained_betas'])}; use another base"
        )
    return settings


def sampler_of(settings: Mapping[str, Any]) -> tuple[str, str]:
    """The sampler that draws as the settings' class does and '', or the fallback and why, in one line."""
    name = settings["_class_name"]
    if name not in OWN:
        return FALLBACK, f"scheduler: no sampler here draws as {name}; {FALLBACK} draws, with the base's noise schedule"
    sampler, needed = OWN[name]
    for field, allowed in needed.items():
        if settings[field] not in allowed:
            how = f"{name} with {field} {settings[field]!r}"
            return (
                FALLBACK,
                f"scheduler: no sampler here draws as {how}; {FALLBACK} draws, with the base's noise schedule",
            )
    return f"{sampler}_karras" if settings.get("use_karras_sigmas") else sampler, ""


def _unread(config: Mapping[str, Any]) -> str:
    """One line that names what the file says and no scheduler knows; '' when there is nothing."""
    odd = sorted(str(name)[:40] for name in config if not str(name).startswith("_") and name not in READ_ELSEWHERE)
    odd = [name for name in odd if name not in _NOISE and not any(name in fields for fields in CLASSES.values())]
    return f"scheduler: not used, no scheduler knows it: {', '.join(odd[:5])}" if odd else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _are_betas(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(beta) and 0 <= beta <= 1 for beta in value)


Rule = tuple[str, Callable[[Any], bool]]
_FLAG: Rule = ("true or false", lambda value: isinstance(value, bool))
_BETA: Rule = ("a number between 0 and 1", lambda value: _is_number(value) and 0 < value < 1)
_ABOVE_0: Rule = ("a number above 0", lambda value: _is_number(value) and value > 0)


def _choice(allowed: tuple[str, ...]) -> Rule:
    return f"one of {', '.join(allowed)}", lambda value: isinstance(value, str) and value in allowed


_RULES: dict[str, Rule] = {
    "num_train_timesteps": (f"1 to {LONGEST}", lambda value: _is_whole(value, 1, LONGEST)),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "beta_schedule": _choice(BETA_SCHEDULES),
    "trained_betas": ("a list of numbers from 0 to 1", _are_betas),
    "prediction_type": _choice(PREDICTION_TYPES),
    "timestep_spacing": _choice(SPACINGS),
    "steps_offset": (f"0 to {LONGEST}", lambda value: _is_whole(value, 0, LONGEST)),
    "rescale_betas_zero_snr": _FLAG,
    "set_alpha_to_one": _FLAG,
    "clip_sample": _FLAG,
    "clip_sample_range": _ABOVE_0,
    "original_inference_steps": (f"1 to {LONGEST}", lambda value: _is_whole(value, 1, LONGEST)),
    "timestep_scaling": _ABOVE_0,
    "use_karras_sigmas": _FLAG,
}


def _check(field: str, value: Any) -> None:
    if field == "thresholding" and value:
        raise RepositoryError(
            "scheduler: thresholding: must be off, got on: it is meant for pixels, not latents; set false"
        )
    wanted, fits = _RULES.get(field, ("", lambda _: True))
    if not fits(value):
        raise RepositoryError(f"scheduler: {field}: must be {wanted}, got {value!r:.60}; use another base")


# Fields of diffusers' schedulers, today's and old ones, that decide nothing about the samplers here: they belong to classes that
# fall back to DDIM, or have no effect beside the settings those samplers ask for.
READ_ELSEWHERE = frozenset(
    (
        *("algorithm_type", "corrector_order", "disable_corrector", "dynamic_thresholding_ratio", "euler_at_final"),
        *("flow_shift", "lambda_min_clipped", "lower_order_final", "predict_epsilon", "predict_x0", "predictor_order"),
        *("sample_max_value", "shift_terminal", "solver_p", "tau_func", "time_shift_type", "use_dynamic_shifting"),
        *("variance_type", "tensor_format", "clip_denoised", "rho", "sigma_data", "sigma_schedule"),
    )
)
