"""Weights of tokens in text embeddings, as AUTOMATIC1111 applies them: the ones that people's prompts were tried with."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LARGEST_SCALE = 4.0  # the gallery's encoder gives 0.998 to 1.001 for two words' weights from 0.5 to 2

Array = npt.NDArray[np.float32]


def emphasised(states: Array, weights: Sequence[Array], widths: Sequence[int]) -> Array:
    """states (n,77,C), weights (n,77) and C of each text encoder, side by side -> states (n,77,C) float32.

    z' = w z, then z'' = z' mean(z) / mean(z') ("Original" emphasis), for each chunk and encoder by itself. Where all weights
    are 1, z stays.
    """
    made = states.copy()
    parts = np.split(made, np.cumsum(widths)[:-1], axis=2)  # views: each is changed in place
    for part, w in zip(parts, weights, strict=True):
        for i in np.flatnonzero((w != 1).any(axis=1)):
            part[i] *= _scale(part[i], w[i, :, None]) * w[i, :, None]
    return made


def _scale(part: Array, weights: Array) -> np.float32:
    """What keeps the mean of one chunk; 1 where the means say nothing: about 0, they have any quotient, of any sign."""
    before, after = part.mean(dtype=np.float64), (part * weights).mean(dtype=np.float64)
    scale = before / after if after else 1.0
    return np.float32(scale if 1 / LARGEST_SCALE <= scale <= LARGEST_SCALE else 1.0)
