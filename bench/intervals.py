"""Paired bootstrap intervals: is a mean difference over the same prompts and seeds more than noise?"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Interval:
    """Mean and its percentile-bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: npt.ArrayLike, groups: npt.ArrayLike, *, draws: int = 4000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the mean of `values` (N,), resampling whole groups (checkpoints) and then values inside them.

    Two-stage cluster bootstrap: pictures of one checkpoint are not independent of each other.
    """
    x, labels = np.asarray(values, float), np.asarray(groups)
    parts = [x[labels == name] for name in dict.fromkeys(labels.tolist())]
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(parts), size=(draws, len(parts)))
    resampled = np.empty(chosen.shape)
    for number, part in enumerate(parts):
        taken = chosen == number
        resampled[taken] = part[generator.integers(part.size, size=(int(taken.sum()), part.size))].mean(1)
    means = resampled.mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean([part.mean() for part in parts])), float(low), float(high))
