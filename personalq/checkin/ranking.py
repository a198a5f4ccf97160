"""The best of many scores, in an order that is always the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def greatest(scores: NDArray[Any], n: int) -> NDArray[np.int64]:
    """Return the places of the n greatest scores, greatest first, equal ones by place."""
    least = np.partition(scores, -n)[-n] if len(scores) > 4 * n else -np.inf
    some = np.flatnonzero(scores >= least)
    return np.asarray(some[np.argsort(-scores[some], kind="stable")][:n], np.int64)
