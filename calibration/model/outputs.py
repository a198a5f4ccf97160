"""What the FP32 UNet computes inside: samples of every layer's and block's output, and the attention of each text row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from personalq.goldens import BLOCK_SAMPLES, LAYER_SAMPLES, sample_positions

from ..statistics.attention import watching_attention
from .conditioning import Conditioning, predict
from .pipeline import cross_attention, quantisable_layers

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Outputs:
    """N inputs: noise_pred (N,4,h,w), attention (N,L,77), layers (N,n,32), blocks (N,m,256).

    *_sizes: values in one whole output, by name, in the order of the samples.
    """

    noise_pred: Float
    attention: Float
    layers: Float
    blocks: Float
    layer_sizes: dict[str, int]
    block_sizes: dict[str, int]


def sampled_outputs(unet: nn.Module, inputs: Sequence[tuple[Tensor, int, Conditioning]]) -> Outputs:
    """Run the UNet on each (sample (1,4,h,w), time step, what it is told of one prompt) and keep samples of what it computes."""
    layers = quantisable_layers(unet)
    blocks = {
        name: module for name, module in unet.named_modules() if isinstance(module, ResnetBlock2D | Transformer2DModel)
    }
    kept: dict[str, Float] = {}
    sizes: dict[str, int] = {}
    attended: dict[int, Float] = {}

    def note(index: int, probabilities: Tensor) -> None:
        attended[index] = probabilities.mean((0, 1, 2)).numpy()

    handles = [module.register_forward_hook(_keep(kept, sizes, name, LAYER_SAMPLES)) for name, module in layers.items()]
    handles += [
        module.register_forward_hook(_keep(kept, sizes, name, BLOCK_SAMPLES)) for name, module in blocks.items()
    ]
    found: dict[str, list[Float]] = {"noise_pred": [], "attention": [], "layers": [], "blocks": []}
    try:
        with torch.no_grad(), watching_attention(unet, note):
            for sample, timestep, told in inputs:
                found["noise_pred"].append(predict(unet, sample, torch.tensor(timestep), told)[0].numpy())
                found["attention"].append(np.stack([attended[i] for i in range(len(cross_attention(unet)))]))
                found["layers"].append(np.stack([kept[name] for name in layers]))
                found["blocks"].append(np.stack([kept[name] for name in blocks]))
    finally:
        for handle in handles:
            handle.remove()
    stacked = {name: np.stack(values).astype(np.float32) for name, values in found.items()}
    layer_sizes, block_sizes = ({name: sizes[name] for name in group} for group in (layers, blocks))
    return Outputs(**stacked, layer_sizes=layer_sizes, block_sizes=block_sizes)


def _keep(
    kept: dict[str, Float], sizes: dict[str, int], name: str, count: int
) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that keeps `count` values of the module's output, at the positions of its name."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        tensor = output if isinstance(output, Tensor) else output[0]
        flat = tensor.reshape(-1)
        sizes[name] = flat.numel()
        kept[name] = flat[torch.from_numpy(sample_positions(name, flat.numel(), count))].numpy()

    return hook
