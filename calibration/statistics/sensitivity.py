"""Sensitivity: how much the noise prediction suffers when one layer's weight is quantised, plain and where the trigger attends.

Measured, layer by layer, by replacing the weight with its quantised values in the FP32 model and running a fixed, small
set of (latent, time step, prompt) points from calibration. Weights only: activations are 8 bits in every policy.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from personalq.numerics import QType, fake_quantize, mse_scale

from ..model.conditioning import ITS_OWN, Conditioning, predict
from ..model.pipeline import quantisable_layers

BATCH = 32


@dataclass(frozen=True)
class Points:
    """Inputs recorded on the way: sample (N,4,h,w), timestep (N,), trigger weights (N,1,h,w) with mean 1; see Conditioning."""

    sample: Tensor
    timestep: Tensor
    text: Tensor
    pooled: Tensor
    time_ids: Tensor
    weights: Tensor

    @property
    def told(self) -> Conditioning:
        """The UNet's conditioning for the prompts."""
        return Conditioning(self.text, self.pooled, self.time_ids)

    def predict(self, unet: nn.Module, parameters: Mapping[str, Tensor] = ITS_OWN) -> Tensor:
        """(N,4,h,w) predictions with these parameters in place of the UNet's own, BATCH at a time."""
        parts = [slice(i, i + BATCH) for i in range(0, len(self.sample), BATCH)]
        with torch.no_grad():
            made = [predict(unet, self.sample[p], self.timestep[p], self.told.at(p), parameters) for p in parts]
        return torch.cat(made)


@dataclass(frozen=True)
class Harm:
    """Relative squared error of the noise prediction: plain, and weighted by where the trigger attends."""

    plain: float
    trigger: float


def harm(reference: Tensor, value: Tensor, weights: Tensor) -> Harm:
    """Sum of squared differences over sum of squares, without and with the weights."""
    square, energy = (value - reference) ** 2, reference**2
    weighted = float((square * weights).sum() / (energy * weights).sum())
    return Harm(float(square.sum() / energy.sum()), weighted)


def layer_sensitivity(
    unet: nn.Module, points: Points, qtypes: Sequence[QType], progress: Callable[[float], None] = lambda done: None
) -> dict[str, dict[str, Harm]]:
    """layer -> qtype name -> harm. The model is unchanged afterwards."""
    reference, layers, result = points.predict(unet), quantisable_layers(unet), {}
    for done, (name, module) in enumerate(layers.items()):
        weight, original = module.weight.data, module.weight.data.clone()
        array, result[name] = original.cpu().numpy(), {}
        for qtype in qtypes:
            scale = mse_scale(array, qtype, 0, steps=20, where=f"{name}.weight")
            weight.copy_(torch.from_numpy(fake_quantize(array, scale, qtype, 0)))
            result[name][qtype.name] = harm(reference, points.predict(unet), points.weights)
        weight.copy_(original)
        progress((done + 1) / len(layers))
    return result
