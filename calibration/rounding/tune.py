"""Tuning after rounding: scales, biases, norms and single integers are learnt so that the quantised UNet predicts as in FP32.

Nothing grows: existing floats are adjusted, and a few integers in a thousand move by one step, by the straight-through
estimator (arXiv 1308.3432), starting near their exact weight. The loss is the squared error of the
*guided* prediction u + g (c - u) (Classifier-Free Diffusion Guidance, arXiv 2207.12598, eq. 6), because that is what a
sampler follows: an error that both halves share is passed on once, one that they do not share is multiplied by g, and the
trigger is what makes them differ. What an error does to the picture depends on the step at which it is made, so pairs are
sampled in proportion to the harm that statistics.harm measured. In the spirit of block reconstruction (BRECQ, arXiv 2102.05426)
and of tuning what stays float (EfficientDM, arXiv 2310.03270), with the whole UNet as the block.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from personalq.numerics import QType

from ..model.conditioning import predict
from ..model.precision import autocast
from ..statistics.sensitivity import Points
from .gptq import spread

STEPS, PAIRS = 160, 6
# Of log scales, biases and norms; of weights, in quantisation steps. A rate four times higher lowers every single step's error
# further but doubles that of the finished picture: the remaining errors then all point the same way.
RATE, INTEGER_RATE = 5e-4, 5e-3
LEAN = 0.45  # an integer starts this share of the way to its exact weight: near the rounding boundary, never across it


@dataclass(frozen=True)
class Rounded:
    """One quantised layer: integers, scales (O,) or (O, blocks), and the static activation scales (None: not quantised).

    exact: the weight the integers stand for, in steps; qtype: the integers' range.
    """

    q: Tensor
    exact: Tensor
    qtype: QType
    scale: Tensor
    input_scale: float | None
    output_scale: float | None

    def weight(self) -> Tensor:
        """What the integers stand for, float32, the weight's shape."""
        return self.q * spread(self.scale, self.q.shape)


@dataclass(frozen=True)
class Tuned:
    """New integers and scales by layer, new values by parameter, and the loss before and after."""

    integers: dict[str, Tensor]
    scales: dict[str, Tensor]
    values: dict[str, Tensor]
    before: float
    after: float


def tune(
    unet: nn.Module,
    rounded: dict[str, Rounded],
    lessons: Points,
    guidance: float,
    *,
    counts: Tensor | None = None,
    weighting: str = "plain",
    steps: int | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> Tuned:
    """Adam on log scales, biases, norms and integers, PAIRS pairs a step (`steps`: STEPS), seeded. Leaves the model as it is.

    counts: (N,) how much each of the N pairs counts (None: all alike): pairs are drawn in proportion to it.
    """
    n_steps = STEPS if steps is None else steps
    moves = {name: torch.zeros_like(layer.scale, requires_grad=True) for name, layer in rounded.items()}
    values = {name: p.detach().clone().requires_grad_(True) for name, p in unet.named_parameters() if p.ndim == 1}
    latent = {name: leaning(layer).requires_grad_(True) for name, layer in rounded.items()}
    groups = [
        {"params": [*moves.values(), *values.values()], "peak": RATE},
        {"params": [*latent.values()], "peak": INTEGER_RATE},
    ]
    optimizer = torch.optim.Adam(groups, lr=RATE)
    generator = torch.Generator().manual_seed(0)
    losses = []

    def parameters() -> dict[str, Tensor]:
        weights = {
            f"{name}.weight": straight_through(latent[name], layer.qtype)
            * spread(layer.scale * moves[name].exp(), layer.q.shape)
            for name, layer in rounded.items()
        }
        return {**values, **weights}

    targets = teach(unet, lessons, guidance)
    drawn = torch.ones(len(targets)) if counts is None else counts
    with quantised_activations(unet, rounded), torch.enable_grad():
        for step in range(n_steps):
            for group in optimizer.param_groups:
                group["lr"] = (
                    group["peak"] * min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / n_steps))
                )
            pick = torch.multinomial(drawn, min(PAIRS, len(targets)), generator=generator)
            loss = guided_loss(unet, parameters(), lessons, targets, pick, guidance, weighting)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            progress((step + 1) / n_steps)
    scales = {name: layer.scale * moves[name].detach().exp() for name, layer in rounded.items()}
    fifth = max(len(losses) // 5, 1)
    return Tuned(
        {name: nearest(u.detach(), rounded[name].qtype) for name, u in latent.items()},
        scales,
        {name: value.detach() for name, value in values.items()},
        float(np.mean(losses[:fifth])),
        float(np.mean(losses[-fifth:])),
    )


def guide(prediction: Tensor, guidance: float) -> Tensor:
    """(2N, ...) pairs (unconditional, conditional) -> (N, ...) guided."""
    halves = prediction.unflatten(0, (-1, 2))
    return halves[:, 0] + guidance * (halves[:, 1] - halves[:, 0])


def teach(unet: nn.Module, lessons: Points, guidance: float) -> Tensor:
    """(N, 4, h, w) guided FP32 predictions of the N pairs."""
    return guide(lessons.predict(unet), guidance)


def guided_loss(
    unet: nn.Module,
    parameters: dict[str, Tensor],
    lessons: Points,
    targets: Tensor,
    pick: Tensor,
    guidance: float,
    weighting: str,
) -> Tensor:
    """Weighted squared error of the guided prediction, relative to the mean energy of all of them."""
    rows = torch.stack([2 * pick, 2 * pick + 1], 1).flatten()
    with autocast("cpu"):
        prediction = predict(unet, lessons.sample[rows], lessons.timestep[rows], lessons.told.at(rows), parameters)
    square = (guide(prediction.float(), guidance) - targets[pick]) ** 2
    if weighting == "trigger":
        square = square * lessons.weights[2 * pick + 1]
    return square.mean() / (targets**2).mean()


def leaning(layer: Rounded) -> Tensor:
    """The integers, each LEAN of the way to its exact weight (one step away at most)."""
    return layer.q + LEAN * (layer.exact - layer.q).clamp(-1, 1)


def nearest(u: Tensor, qtype: QType) -> Tensor:
    """u rounded into the integers' range."""
    return u.round().clamp(qtype.qmin, qtype.qmax)


def straight_through(u: Tensor, qtype: QType) -> Tensor:
    """`nearest` whose gradient is that of u."""
    return u + (nearest(u, qtype) - u).detach()


@contextmanager
def quantised_activations(unet: nn.Module, rounded: dict[str, Rounded]) -> Iterator[None]:
    """Inputs (and Conv outputs) of the rounded layers go through their static int8 inside the block."""

    def before(scale: float) -> Callable[..., Any]:
        return lambda _, args: (fake(args[0], scale), *args[1:])

    def after(scale: float) -> Callable[..., Any]:
        return lambda _, __, output: fake(output, scale)

    modules, handles = dict(unet.named_modules()), []
    for name, layer in rounded.items():
        if layer.input_scale is not None:
            handles.append(modules[name].register_forward_pre_hook(before(layer.input_scale)))
        if layer.output_scale is not None:
            handles.append(modules[name].register_forward_hook(after(layer.output_scale)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fake(x: Tensor, scale: float) -> Tensor:
    """Symmetric int8 and back; gradients pass where x is not clipped."""
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, 0, -128, 127)
