"""How much an error of the prediction harms the finished picture, measured for each part of the schedule."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..model.conditioning import ITS_OWN, Conditioning, encode_guided, predict
from ..model.reference import start_noise
from ..rounding.tune import Rounded, guide, quantised_activations
from .evidence import Evidence

PARTS, PROMPTS = 5, 4


@dataclass(frozen=True)
class Sampler:
    """The FP32 UNet and its quantised twin under the recipe's prompts, guidance and steps. told: of 2P prompts, in pairs."""

    evidence: Evidence
    rounded: Mapping[str, Rounded]
    weights: Mapping[str, Tensor]
    told: Conditioning

    def predict(self, latents: Tensor, timestep: Tensor, *, quantised: bool) -> Tensor:
        """Guided prediction (P, 4, h, w)."""
        unet = self.evidence.pipe.unet
        layers, weights = (dict(self.rounded), self.weights) if quantised else ({}, ITS_OWN)
        with quantised_activations(unet, layers):
            found = predict(unet, latents.repeat_interleave(2, 0), timestep, self.told, weights)
        return guide(found, self.evidence.recipe.guidance)

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """The latents one step on, by the scheduler."""
        after: Tensor = self.evidence.pipe.scheduler.step(prediction, timestep, latents).prev_sample
        return after


def harm_by_time(evidence: Evidence, rounded: Mapping[str, Rounded]) -> dict[float, float]:
    """Time step -> squared error of the final latents per squared error of the guided predictions made around it.

    The schedule is cut into PARTS, the last step by itself; in one part at a time the quantised UNet predicts, FP32 in all
    others. Medians over PROMPTS prompts of what is loaded, because a picture that changes completely says nothing about the
    part.
    """
    pipe, recipe = evidence.pipe, evidence.recipe
    pipe.scheduler.set_timesteps(recipe.steps)
    times = list(pipe.scheduler.timesteps)
    chosen = recipe.parts[0].prompts[:PROMPTS]
    weights = {f"{name}.weight": layer.weight() for name, layer in rounded.items()}
    sampler = Sampler(evidence, rounded, weights, encode_guided(pipe, list(chosen)))
    found: dict[float, float] = {}
    with torch.no_grad():
        path = exact_path(sampler, times, len(chosen))
        for part in parts(len(times)):
            evidence.progress("measuring what errors do to pictures", part.start / len(times))
            harm = harm_of(sampler, times, path, part)
            found |= {float(times[i]): harm for i in part}
    return found


def parts(n_steps: int) -> list[range]:
    """PARTS nearly equal ranges of the steps but the last, and the last."""
    edges = [round(i * (n_steps - 1) / PARTS) for i in range(PARTS + 1)]
    ranges = [range(a, b) for a, b in pairwise(edges) if b > a]
    return [*ranges, range(n_steps - 1, n_steps)]


def exact_path(sampler: Sampler, times: list[Tensor], n: int) -> list[Tensor]:
    """FP32 latents before every step, and after the last."""
    seed = sampler.evidence.recipe.seed * 1000 + 500
    latents = torch.stack([torch.from_numpy(start_noise(sampler.evidence.pipe, seed + i)) for i in range(n)])
    path = [latents]
    for t in times:
        path.append(sampler.step(sampler.predict(path[-1], t, quantised=False), t, path[-1]))
    return path


def harm_of(sampler: Sampler, times: list[Tensor], path: list[Tensor], part: range) -> float:
    """Final squared error per squared error of the predictions in `part`, the median over prompts."""
    latents, made = path[part.start], torch.zeros(len(path[0]))
    for i in range(part.start, len(times)):
        prediction = sampler.predict(latents, times[i], quantised=i in part)
        if i in part:
            exact = sampler.predict(latents, times[i], quantised=False)
            made += ((prediction - exact) ** 2).sum((1, 2, 3))
        latents = sampler.step(prediction, times[i], latents)
    return float((((latents - path[-1]) ** 2).sum((1, 2, 3)) / made.clamp(min=1e-12)).median())
