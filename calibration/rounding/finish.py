"""The last stage of a policy, when every layer is decided: tune what stays float, or correct the prediction."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from personalq.numerics import QTYPES, quantize
from personalq.spec import LayerSpec

from ..statistics.evidence import Evidence
from ..statistics.harm import harm_by_time
from ..statistics.ranges import N_TIME_BINS, time_bin
from .gptq import spread
from .tune import Rounded, quantised_activations, tune

Tensors = dict[str, npt.NDArray[Any]]


def rounded_layers(evidence: Evidence, layers: Mapping[str, LayerSpec], tensors: Tensors) -> dict[str, Rounded]:
    """The quantised layers as torch tensors, for simulating the spec's arithmetic on the FP32 model."""
    result = {}
    for name, layer in layers.items():
        if layer.weight == "float":
            continue
        weight, scale = evidence.seen.layers[name].weight, tensors[f"{name}.weight_scale"]
        stored = tensors.get(f"{name}.weight_q")
        qtype = QTYPES[layer.weight]
        q = quantize(weight.numpy(), scale, qtype, 0) if stored is None else stored
        inputs, output = tensors.get(f"{name}.input_scale"), tensors.get(f"{name}.output_scale")
        result[name] = Rounded(
            q=torch.from_numpy(q.astype(np.float32)),
            exact=weight.float() / spread(torch.from_numpy(np.asarray(scale, np.float32)), weight.shape),
            qtype=qtype,
            scale=torch.from_numpy(np.asarray(scale, np.float32)),
            input_scale=None if inputs is None else float(inputs),
            output_scale=None if output is None else float(output),
        )
    return result


def tune_decisions(
    evidence: Evidence, layers: Mapping[str, LayerSpec], tensors: Tensors, weighting: str
) -> tuple[Tensors, tuple[str, ...]]:
    """New integers and scales of the weights, and `<parameter>.tuned` for every bias and norm of the UNet.

    For rules without balance or low-rank branch: integers are tuned towards the weights that are loaded. A base's teacher is
    its own FP32 UNet, at the states and texts that its checkpoints cause: what they change is added to both sides at run time.
    """
    rounded = rounded_layers(evidence, layers, tensors)
    harm = harm_by_time(evidence, rounded)
    found = tune(
        evidence.pipe.unet,
        rounded,
        evidence.lessons,
        evidence.recipe.guidance,
        counts=torch.tensor([at_time(harm, float(t)) for t in evidence.lessons.timestep[::2]]),
        weighting=weighting,
        progress=lambda done: evidence.progress("tuning", done),
    )
    scales = {f"{name}.weight_scale": scale.numpy() for name, scale in found.scales.items()}
    values = {f"{name}.tuned": value.numpy() for name, value in found.values.items()}
    integers = {f"{name}.weight_q": q.to(torch.int8).numpy() for name, q in found.integers.items()}
    return {**integers, **scales, **values}, tuple(sorted(found.values))


def at_time(harm: Mapping[float, float], timestep: float) -> float:
    """The harm at a time step, or at the nearest: a checkpoint with a schedule of its own takes other steps than its base."""
    return harm[min(harm, key=lambda known: abs(known - timestep))]


def correct(evidence: Evidence, layers: Mapping[str, LayerSpec], tensors: Tensors) -> Tensors:
    """PTQD's correlated part and mean, per time-step bin: `correction.gain` (bins,) and `correction.mean` (bins, 4).

    For prediction y and quantised prediction y + e: e = k y + r; k by least squares, the mean of r per latent channel
    (PTQD, NeurIPS'23, arXiv 2305.10657, section 4). Its third part, taking r's variance out of the sampler's noise,
    has no counterpart in a deterministic sampler.
    """
    rounded, lessons = rounded_layers(evidence, layers, tensors), evidence.lessons
    weights = {f"{name}.weight": r.weight() for name, r in rounded.items()}
    exact = lessons.predict(evidence.pipe.unet)
    with quantised_activations(evidence.pipe.unet, rounded):
        error = lessons.predict(evidence.pipe.unet, weights) - exact
    bins = np.array([time_bin(float(t)) for t in lessons.timestep])
    gain, mean = np.zeros(N_TIME_BINS, np.float32), np.zeros((N_TIME_BINS, exact.shape[1]), np.float32)
    for number in set(bins.tolist()):
        inside = torch.from_numpy(bins == number)
        gain[number], shift = correlated_part(exact[inside], error[inside])
        mean[number] = shift.numpy()
    return {"correction.gain": gain, "correction.mean": mean}


def correlated_part(y: Tensor, e: Tensor) -> tuple[float, Tensor]:
    """e = k y + r: k by least squares and the mean of r per channel. y, e: (N, C, h, w)."""
    k = float((e * y).sum() / (y * y).sum())
    return k, (e - k * y).mean((0, 2, 3))
