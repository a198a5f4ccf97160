"""Is a mean difference over the same inputs more than noise? Percentile bootstrap of paired values."""

from collections.abc import Sequence

import numpy as np


def interval(values: Sequence[float], *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """(low, high) of the mean of `values`, resampled with replacement; one value is its own interval."""
    x = np.asarray(values, np.float64)
    chosen = np.random.default_rng(seed).integers(len(x), size=(draws, len(x)))
    low, high = np.quantile(x[chosen].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
