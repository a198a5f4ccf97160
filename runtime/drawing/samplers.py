"""Samplers in numpy: a plan (which time steps, which noise levels) and a pure step. They know no engine and no prompt.

Everything is written for x = alpha * x_0 + sigma * eps with alpha^2 + sigma^2 = 1 (diffusers' Euler scales x by
1 / alpha instead; the steps are the same). In that form every step here is the first one with another x_0 or eps:

    x' = alpha' * x_0 + sigma' * eps        DDIM (Song et al., ICLR'21), eq. 12, eta = 0; Euler is DDIM at its own times

Euler ancestral: Karras et al., NeurIPS'22, with noise put back as in k-diffusion. DPM-Solver++ 2M: Lu et al., 2022,
algorithm 2 (multistep). PNDM: Liu et al., ICLR'22, as PLMS: multistep from the start, the second step taken twice.
LCM: Luo et al., 2023, with the boundary scaling of consistency models.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from personalq.errors import EngineError

from .schedule import Array, Schedule

Levels = npt.NDArray[np.float64]

# Where a schedule ends in pure noise, its last alpha_bar is this for samplers that divide by alpha (as in diffusers).
_TINY_ALPHA_BAR = 2.0**-24
_RHO = 7.0  # Karras et al., eq. 5
_SIGMA_DATA = 0.5  # consistency models' boundary condition
_FEW_STEPS = 15  # DPM-Solver++ ends with a first-order step below this many
# Adams-Bashforth's weights by how many outputs there are, the newest first (PNDM, eq. 12).
_ADAMS = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@dataclass(frozen=True)
class Plan:
    """What a sampler does in n steps. All (n,).

    times: what the model is told (float: some lie between training steps). alpha, sigma: the level before each step;
    next_alpha, next_sigma: after it. start_scale: what standard normal noise is multiplied with.
    """

    times: Levels
    alpha: Levels
    sigma: Levels
    next_alpha: Levels
    next_sigma: Levels
    start_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.times)


@dataclass
class Trail:
    """What a multistep sampler remembers of one run: the x_0 of the step before; what the model said in the last four, and x
    before the first."""

    x_0: Array | None = None
    outputs: list[Array] = field(default_factory=list)
    start: Array | None = None


# (plan, step number, x, (x_0, eps), standard normal noise shaped like x, trail) -> x at the next level.
StepRule = Callable[[Schedule, Plan, int, Array, tuple[Array, Array], Array, Trail], Array]


@dataclass(frozen=True)
class Sampler:
    """A named way to denoise. is_noisy: its steps draw noise. clips: it honours the base's clip_sample."""

    plan: Callable[[Schedule, int], Plan]
    step: StepRule
    is_noisy: bool = False
    clips: bool = False


def plan_steps(name: str, schedule: Schedule, n_steps: int) -> Plan:
    """The plan of a sampler. Raises EngineError for an unknown one, or steps that the schedule does not have."""
    if not 1 <= n_steps <= schedule.n_train:
        raise EngineError(f"steps: must be between 1 and {schedule.n_train}, got {n_steps}; choose another number")
    plan = sampler_named(name).plan(schedule, n_steps)
    if plan.times.max() >= schedule.n_train:
        raise EngineError(
            f"steps: must stay below time step {schedule.n_train}, got {plan.times.max():.0f} "
            f"with steps_offset {schedule.steps_offset}; use fewer steps"
        )
    return plan


def sampler_named(name: str) -> Sampler:
    """Raises EngineError for a name that is not in SAMPLERS."""
    if name not in SAMPLERS:
        raise EngineError(f"sampler: must be one of {', '.join(SAMPLERS)}, got {name!r}; choose one of them")
    return SAMPLERS[name]


def predict(schedule: Schedule, plan: Plan, i: int, x: Array, model_output: Array, clip: float) -> tuple[Array, Array]:
    """The model's output before step i -> (x_0, eps), shaped like x, float32; x_0 clipped to +-clip (inf: not)."""
    a, b = np.float32(plan.alpha[i]), np.float32(plan.sigma[i])
    if schedule.prediction_type == "v_prediction":
        x_0, eps = a * x - b * model_output, a * model_output + b * x
    elif schedule.prediction_type == "sample":
        x_0, eps = model_output, (x - a * model_output) / b
    elif a > 0:
        x_0, eps = (x - b * model_output) / a, model_output
    else:
        raise EngineError(
            f"scheduler: prediction_type: must be v_prediction or sample at time step {plan.times[i]:.0f}, where nothing "
            "but noise is left (rescale_betas_zero_snr), got epsilon; fix the base's scheduler_config.json"
        )
    return np.clip(x_0, -clip, clip, dtype=np.float32), np.asarray(eps, dtype=np.float32)


def _ddim_step(
    schedule: Schedule, plan: Plan, i: int, x: Array, said: tuple[Array, Array], noise: Array, trail: Trail
) -> Array:
    x_0, eps = said
    return _mix(plan.next_alpha[i], x_0, plan.next_sigma[i], eps)


def _ancestral_step(
    schedule: Schedule, plan: Plan, i: int, x: Array, said: tuple[Array, Array], noise: Array, trail: Trail
) -> Array:
    """Step down to less noise than the next level has, and add the difference as new noise."""
    x_0, eps = said
    before, after = plan.sigma[i] / plan.alpha[i], plan.next_sigma[i] / plan.next_alpha[i]
    up = math.sqrt(after**2 * (before**2 - after**2) / before**2)
    down = math.sqrt(after**2 - up**2)
    return np.asarray(np.float32(plan.next_alpha[i]) * (x_0 + _mix(down, eps, up, noise)), dtype=np.float32)


def _multistep_step(
    schedule: Schedule, plan: Plan, i: int, x: Array, said: tuple[Array, Array], noise: Array, trail: Trail
) -> Array:
    """Second order from the x_0 of two steps; the first step, and the last one to noise 0, have one."""
    x_0, before = said[0], trail.x_0
    trail.x_0 = x_0
    is_last = i == len(plan) - 1 and (plan.next_sigma[i] == 0 or len(plan) < _FEW_STEPS)
    if before is not None and not is_last:
        h = _half_log_snr(plan.next_alpha[i], plan.next_sigma[i]) - _half_log_snr(plan.alpha[i], plan.sigma[i])
        h_0 = _half_log_snr(plan.alpha[i], plan.sigma[i]) - _half_log_snr(plan.alpha[i - 1], plan.sigma[i - 1])
        x_0 = x_0 + np.float32(0.5 * h / h_0) * (x_0 - before)
    eps = np.asarray((x - np.float32(plan.alpha[i]) * x_0) / np.float32(plan.sigma[i]), dtype=np.float32)
    return _mix(plan.next_alpha[i], x_0, plan.next_sigma[i], eps)


def _pndm_step(
    schedule: Schedule, plan: Plan, i: int, x: Array, said: tuple[Array, Array], noise: Array, trail: Trail
) -> Array:
    """DIM with a mean of the last outputs, which are eps or v as the model says them. Step 1 starts again where step 0 did."""
    is_v, (a, b) = schedule.prediction_type == "v_prediction", (plan.alpha[i], plan.sigma[i])
    output = _mix(a, said[1], -b, said[0]) if is_v else said[1]
    if i == 1:
        assert trail.start is not None
        mean, x = _mix(0.5, output, 0.5, trail.outputs[0]), trail.start
        bar = schedule.alphas_cumprod[int(plan.times[1]) + schedule.n_train // (len(plan) - 1)]
        a, b = math.sqrt(bar), math.sqrt(1 - bar)
    else:
        trail.start = x if i == 0 else trail.start
        trail.outputs = [output, *trail.outputs[:3]]
        mean = np.tensordot(np.asarray(_ADAMS[len(trail.outputs)], np.float32), np.stack(trail.outputs), axes=1)
    if is_v:
        return _mix(plan.next_alpha[i], _mix(a, x, -b, mean), plan.next_sigma[i], _mix(a, mean, b, x))
    grow = plan.next_alpha[i] / a
    return _mix(grow, x, plan.next_sigma[i] - grow * b, mean)


def _lcm_step(
    schedule: Schedule, plan: Plan, i: int, x: Array, said: tuple[Array, Array], noise: Array, trail: Trail
) -> Array:
    """Jump to the end by the consistency function, then put the next level's noise on it."""
    t = plan.times[i] * schedule.lcm_scaling
    skip, out = _SIGMA_DATA**2 / (t**2 + _SIGMA_DATA**2), t / math.sqrt(t**2 + _SIGMA_DATA**2)
    denoised = _mix(out, said[0], skip, x)
    if i == len(plan) - 1:
        return denoised
    return _mix(plan.next_alpha[i], denoised, plan.next_sigma[i], noise)


def _mix(a: float, x: Array, b: float, y: Array) -> Array:
    return np.asarray(np.float32(a) * x + np.float32(b) * y, dtype=np.float32)


def _half_log_snr(alpha: float, sigma: float) -> float:
    return math.log(alpha) - math.log(sigma)


def _ddim_plan(schedule: Schedule, n_steps: int) -> Plan:
    times = _SPACED[schedule.spacing](schedule, n_steps)
    before = times - schedule.n_train // n_steps
    bar, kept = schedule.alphas_cumprod, np.maximum(before, 0)
    after = np.where(before >= 0, bar[kept.clip(max=schedule.n_train - 1)], schedule.final_alpha)
    inside = bar[times.clip(max=schedule.n_train - 1)]
    return Plan(times.astype(np.float64), *_levels(inside), *_levels(after))


def _pndm_plan(schedule: Schedule, n_steps: int) -> Plan:
    """DDIM's plan; the second time is asked twice, first to mend the step to it."""
    plan = _ddim_plan(schedule, n_steps)
    if n_steps == 1:
        return plan
    again = np.insert(np.arange(n_steps), 1, 1)
    alpha, sigma = (np.insert(plan.next_alpha, 1, plan.alpha[1]), np.insert(plan.next_sigma, 1, plan.sigma[1]))
    return Plan(plan.times[again], plan.alpha[again], plan.sigma[again], alpha, sigma)


def _lcm_plan(schedule: Schedule, n_steps: int) -> Plan:
    """n_steps of the times that the LCM was distilled with."""
    origin = np.arange(1, schedule.lcm_steps + 1) * (schedule.n_train // schedule.lcm_steps) - 1
    if n_steps > len(origin):
        raise EngineError(f"steps: must be at most {len(origin)} with sampler lcm, got {n_steps}; 4 to 8 is usual")
    chosen = np.floor(np.linspace(0, len(origin), num=n_steps, endpoint=False)).astype(np.int64)
    times = origin[::-1][chosen]
    bar = schedule.alphas_cumprod[times]
    return Plan(times.astype(np.float64), *_levels(bar), *_levels(np.append(bar[1:], bar[-1])))


def _euler_plan(schedule: Schedule, n_steps: int) -> Plan:
    times = _times(schedule, n_steps)
    sigmas = np.interp(times, np.arange(schedule.n_train), _all_sigmas(schedule))
    scale = 1.0 if schedule.spacing == "leading" else float(sigmas.max() / math.hypot(sigmas.max(), 1.0))
    return _plan_of_sigmas(times, sigmas, scale)


def _dpm_plan(schedule: Schedule, n_steps: int) -> Plan:
    """One more time step than asked for is spaced, and the cleanest one dropped (trailing: exactly as many as asked for)."""
    last = schedule.n_train
    if schedule.spacing == "linspace":
        times: Levels = np.linspace(0, last - 1, n_steps + 1).round()[::-1][:-1]
    elif schedule.spacing == "leading":
        spaced = np.arange(n_steps + 1, dtype=np.float64) * (last // (n_steps + 1))
        times = spaced[::-1][:-1] + schedule.steps_offset
    else:
        times = _trailing(schedule, n_steps).astype(np.float64)
    return _plan_of_sigmas(times, np.interp(times, np.arange(last), _all_sigmas(schedule)))


def _dpm_karras_plan(schedule: Schedule, n_steps: int) -> Plan:
    """Sigmas evenly spaced in sigma^(1/7) over the whole schedule; each at the training step nearest to it."""
    every = _all_sigmas(schedule)
    low, high = every[0] ** (1 / _RHO), every[-1] ** (1 / _RHO)
    sigmas = (high + np.linspace(0, 1, n_steps) * (low - high)) ** _RHO
    times = np.interp(np.log(sigmas), np.log(every), np.arange(schedule.n_train)).round()
    return _plan_of_sigmas(times, sigmas)


def _plan_of_sigmas(times: Levels, sigmas: Levels, start_scale: float = 1.0) -> Plan:
    """sigma / alpha of each step (as Karras counts) -> a plan that ends at 0."""
    bar = 1 / (1 + sigmas**2)
    return Plan(np.asarray(times, np.float64), *_levels(bar), *_levels(np.append(bar[1:], 1.0)), start_scale)


def _levels(bar: Levels) -> tuple[Levels, Levels]:
    return np.sqrt(bar), np.sqrt(1 - bar)


def _all_sigmas(schedule: Schedule) -> Levels:
    bar = np.where(schedule.alphas_cumprod > 0, schedule.alphas_cumprod, _TINY_ALPHA_BAR)
    return np.asarray(np.sqrt((1 - bar) / bar))


def _times(schedule: Schedule, n_steps: int) -> Levels:
    """Euler's time steps: 'linspace' is not rounded."""
    if schedule.spacing == "linspace":
        return np.linspace(0, schedule.n_train - 1, n_steps, dtype=np.float32)[::-1].astype(np.float64)
    return _SPACED[schedule.spacing](schedule, n_steps).astype(np.float64)


def _leading(schedule: Schedule, n_steps: int) -> npt.NDArray[np.int64]:
    ratio = schedule.n_train // n_steps
    return np.arange(n_steps, dtype=np.int64)[::-1] * ratio + schedule.steps_offset


def _trailing(schedule: Schedule, n_steps: int) -> npt.NDArray[np.int64]:
    # arange may give one step too many (1000 / n is rarely exact): a time step below 0, which we drop.
    steps = np.round(np.arange(schedule.n_train, 0, -schedule.n_train / n_steps)).astype(np.int64) - 1
    return np.asarray(steps[:n_steps])


def _linspace(schedule: Schedule, n_steps: int) -> npt.NDArray[np.int64]:
    return np.linspace(0, schedule.n_train - 1, n_steps).round()[::-1].astype(np.int64)


_SPACED: dict[str, Callable[[Schedule, int], npt.NDArray[np.int64]]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(_ddim_plan, _ddim_step, clips=True),
    "euler": Sampler(_euler_plan, _ddim_step),
    "euler_a": Sampler(_euler_plan, _ancestral_step, is_noisy=True),
    "dpmpp_2m": Sampler(_dpm_plan, _multistep_step),
    "dpmpp_2m_karras": Sampler(_dpm_karras_plan, _multistep_step),
    "pndm": Sampler(_pndm_plan, _pndm_step),
    "lcm": Sampler(_lcm_plan, _lcm_step, is_noisy=True, clips=True),
}
