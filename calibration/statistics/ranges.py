"""Streamed statistics of the UNet's layers: ranges of every Conv and Linear input and Conv output, per time-step bin."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from personalq.numerics import INT8

from ..model.pipeline import quantisable_layers
from .histogram import Histogram

N_TIME_BINS = 5
EVEN = (1.0,) * N_TIME_BINS


def time_bin(timestep: float, train_steps: int = 1000) -> int:
    """Which of the N_TIME_BINS equal parts of the schedule a time step falls into."""
    return min(int(timestep * N_TIME_BINS / train_steps), N_TIME_BINS - 1)


@dataclass
class LayerRanges:
    """Histograms of |input| and (Conv only) |output|, one per time-step bin; the largest |input| of every channel."""

    op: str
    weight: Tensor
    channel_absmax: npt.NDArray[np.float32]
    inputs: list[Histogram] = field(default_factory=lambda: [Histogram.empty() for _ in range(N_TIME_BINS)])
    outputs: list[Histogram] = field(default_factory=lambda: [Histogram.empty() for _ in range(N_TIME_BINS)])

    @classmethod
    def of(cls, module: nn.Module) -> "LayerRanges":
        """Empty ranges of a Conv2d or Linear."""
        weight = module.weight.detach()
        return cls("conv" if isinstance(module, nn.Conv2d) else "linear", weight, np.zeros(weight.shape[1], np.float32))

    def input(self, time_weights: Sequence[float] = EVEN) -> Histogram:
        """Histogram of the input over all time steps; time_weights: how much each bin counts."""
        return _merge(self.inputs, time_weights)

    def output(self, time_weights: Sequence[float] = EVEN) -> Histogram:
        """Histogram of the output over all time steps."""
        return _merge(self.outputs, time_weights)

    def note_channels(self, x: Tensor) -> None:
        """x: (B, C, H, W) of a Conv, (..., C) of a Linear."""
        last = x.movedim(1, -1) if self.op == "conv" else x
        peak = last.detach().abs().reshape(-1, last.shape[-1]).amax(0).float().numpy()
        self.channel_absmax = np.maximum(self.channel_absmax, peak)


def time_bin_gain_db(layer: LayerRanges) -> float:
    """How much lower the input's squared error would be with one scale per time-step bin instead of a shared one, in dB."""
    shared = float(layer.input().scale(INT8, "mse", "input"))
    seen = [h for h in layer.inputs if h.absmax > 0]
    together = sum(h.error(shared, INT8) for h in seen)
    apart = sum(h.error(float(h.scale(INT8, "mse", "input")), INT8) for h in seen)
    return float(10 * np.log10(max(together, 1e-30) / max(apart, 1e-30)))


def _merge(histograms: list[Histogram], time_weights: Sequence[float]) -> Histogram:
    weighed = [replace(h, counts=h.counts * w) for h, w in zip(histograms, time_weights, strict=True)]
    total = weighed[0]
    for histogram in weighed[1:]:
        total = total.merged(histogram)
    return total


class Observer:
    """Collects LayerRanges while the UNet runs; memory does not grow with the number of samples."""

    def __init__(self, unet: nn.Module):
        self.unet = unet
        self.layers = {name: LayerRanges.of(module) for name, module in quantisable_layers(unet).items()}
        self.bin = 0
        self.samples = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are on the UNet inside the block, and gone after it."""
        handles = [self.unet.register_forward_pre_hook(self._note_time, with_kwargs=True)]
        for name, module in quantisable_layers(self.unet).items():
            handles.append(module.register_forward_hook(self._hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_time(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        sample = args[0] if args else kwargs["sample"]
        self.bin = time_bin(float(torch.as_tensor(timestep).flatten()[0]))
        self.samples += sample.shape[0]

    def _hook(self, name: str) -> Any:
        ranges = self.layers[name]

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            ranges.inputs[self.bin].add(args[0], f"{name} input")
            ranges.note_channels(args[0])
            if ranges.op == "conv":
                ranges.outputs[self.bin].add(output, f"{name} output")

        return note
