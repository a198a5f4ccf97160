"""Input balances: a factor per input channel moves range from activations into weights, so that one scale fits all."""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .gptq import Hessian

Array = npt.NDArray[np.float32]
STRENGTH = 0.5  # alpha of SmoothQuant
NARROWEST = 1e-3  # of the largest factor: a channel that calibration never saw must not claim the whole range


def smooth(channel_absmax: Array, weight: Array) -> Array:
    """s_j = max|X_j|^a / max|W_j|^(1-a), a = 0.5 (SmoothQuant, ICML'23, arXiv 2211.10438, eq. 4). (C_in,), largest is 1.

    channel_absmax: (C_in,) largest |input| per channel; weight: (O, C_in[, kh, kw]).
    """
    other = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != 1))
    factors = np.asarray(channel_absmax, np.float32) ** STRENGTH / np.maximum(other, 1e-8) ** (1 - STRENGTH)
    return _bounded(factors)


def shortcut(channel_absmax: Array, skip: int) -> Array:
    """One factor for the channels from the previous block and one for the last `skip` channels, from the skip connection.

    Q-Diffusion (ICCV'23, arXiv 2302.04304, section 4.2) quantises the two halves of a concatenation apart. Each half fills
    the int8 range here too; the weight halves share the output channel's scale, so that the layer stays one integer kernel.
    """
    halves = np.split(np.asarray(channel_absmax, np.float32), [len(channel_absmax) - skip])
    return _bounded(np.concatenate([np.full(len(half), half.max(), np.float32) for half in halves]))


def _bounded(factors: Array) -> Array:
    peak = max(float(factors.max()), 1e-30)
    return np.maximum(factors / peak, NARROWEST).astype(np.float32)


def skip_channels(unet: nn.Module) -> dict[str, int]:
    """Layer name -> how many of its input channels came over the skip connection: conv1 and conv_shortcut of up blocks."""
    config = unet.config
    widths, per_block = list(config.block_out_channels), config.layers_per_block
    counts = per_block if isinstance(per_block, list | tuple) else [per_block] * len(widths)
    skips = [widths[0]]
    for i, (width, count) in enumerate(zip(widths, counts, strict=True)):
        skips += [width] * (count + (i < len(widths) - 1))
    found = {}
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            skip = skips.pop()
            found |= {f"up_blocks.{i}.resnets.{j}.{part}": skip for part in ("conv1", "conv_shortcut")}
    return found


def balanced_hessian(hessian: Hessian, vector: Array) -> Hessian:
    """Second moments of the input divided by `vector`; every channel stands for K / C_in neighbouring columns."""
    inverse = torch.from_numpy(1 / vector).repeat_interleave(len(hessian.total) // len(vector))
    return Hessian(hessian.total * inverse[:, None] * inverse[None], hessian.n)


def low_rank(weight: Array, rank: int) -> tuple[Array, Array]:
    """The best rank-r part of weight (O, K) by SVD: (down (K, r), up (r, O)), weight ~ (down @ up).T, float16 values."""
    u, s, vt = np.linalg.svd(weight.astype(np.float32), full_matrices=False)
    root = np.sqrt(s[:rank])
    down, up = (vt[:rank].T * root).astype(np.float16), (u[:, :rank] * root).T.astype(np.float16)
    return down, up
