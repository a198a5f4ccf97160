"""Sensitivity: how much the noise prediction suffers when one layer's weight is quantised, plain and where the trigger attends.

Measured, layer by layer, by replacing the weight with its quantised values in the FP32 model and running a fixed, small
set of (latent, time step, prompt) points that calibration met. Weights only: activations stay 8 bit in every policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from personalq.numerics import QType, fake_quantize, mse_scale

from .model import quantisable_layers


@dataclass(frozen=True)
class Points:
    """Inputs met on the way: sample (N,4,h,w), timestep (N,), text (N,77,C), trigger weights (N,1,h,w) with mean 1."""

    sample: Tensor
    timestep: Tensor
    text: Tensor
    weights: Tensor

    def predict(self, unet: nn.Module) -> Tensor:
        """(N,4,h,w) noise prediction."""
        with torch.no_grad():
            return unet(self.sample, self.timestep, self.text, return_dict=False)[0]


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
