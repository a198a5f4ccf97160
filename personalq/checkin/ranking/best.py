"""The best of many scores, in a deterministic order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def greatest(scores: NDArray[Any], n: int) -> NDArray[np.int64]:
    """Return the places of the n greatest scores, greatest first, equal ones by place."""
    usual = np.flatnonzero(scores > 0)  # most scores are often 0, and a partition is slow on equal ones
    some = usual[_best(scores[usual], n)] if len(usual) >= n else _best(scores, n)
    return np.asarray(some[np.argsort(-scores[some], kind="stable")], np.int64)


def _best(scores: NDArray[Any], n: int) -> NDArray[np.int64]:
    """Return the places of the n greatest scores, of equal ones the first, in no order but that of equal ones."""
    if len(scores) <= n:
        return np.arange(len(scores))
    least = np.partition(scores, -n)[-n]
    above = np.flatnonzero(scores > least)
    return np.concatenate([above, np.flatnonzero(scores == least)[: n - len(above)]])
