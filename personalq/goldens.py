"""What a checkpoint's goldens hold: tensor names, the format's version, and which values of an output are sampled.

Written by calibration (torch, FP32), read by the gate (numpy). A layer's output is kept as a few values at seeded
positions: enough to measure its error, a thousandth of its size.
"""

import zlib

import numpy as np

from .rows import Ids

GOLDEN = "golden.safetensors"  # in a bundle
VERSION = "2"  # metadata 'version': 1 had no samples of layers and blocks, no attention, no scheduler step
TENSORS = (
    *("ids", "text_embeds", "rows", "sample", "timestep", "prompt", "noise_pred"),
    *("latent", "decoded", "image_prompt", "start_noise", "images"),
    # images: drawn by the metadata's 'sampler'.
    # next_sample (N,4,h,w): where DDIM's step number next_step (N,) leads from each sample with its noise_pred.
    # attention (N,L,77): mean over heads and pixels of each cross-attention layer. layers (N,n,32), blocks (N,m,256):
    # sampled outputs; the metadata has {name: values in the whole output} of both, in the same order.
    *("next_step", "next_sample", "attention", "layers", "blocks"),
)
POOLED = "pooled"  # SDXL alone: (prompts, P), the second encoder's pooled text
LAYER_SAMPLES, BLOCK_SAMPLES = 32, 256


def sample_positions(name: str, size: int, count: int) -> Ids:
    """(count,) int64 positions, drawn by the name's seed, in a flattened output of `size` values (batch 1)."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return np.sort(generator.integers(0, size, count, dtype=np.int64))
