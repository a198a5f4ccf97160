"""Weights on text embeddings: A1111's formula, written out here once more and in float64."""

import numpy as np
import pytest

from runtime.drawing.emphasis import emphasised


def a1111(z: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One chunk of one encoder: z *= w, then the mean that it had."""
    weighted = z.astype(np.float64) * weights[:, None]
    return weighted * (z.mean(dtype=np.float64) / weighted.mean())


@pytest.mark.parametrize("widths", [(6,), (2, 4)], ids=["one encoder", "two"])
def test_each_chunk_and_encoder_is_weighed_by_a1111s_formula(widths: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    states = random.normal(0.3, 1.0, (3, 77, 6)).astype(np.float32)
    weights = [np.ones((3, 77), np.float32) for _ in widths]
    for i, w in enumerate(weights):
        w[0, 2:5], w[2, 7 + i] = 1.3, 0.5
    before = states.copy()
    made = emphasised(states, weights, widths)
    assert (states == before).all() and made.dtype == np.float32
    ends = np.cumsum((0, *widths))
    for start, end, w in zip(ends, ends[1:], weights, strict=False):
        for i in (0, 2):
            assert np.abs(made[i, :, start:end] - a1111(states[i, :, start:end], w[i])).max() < 2e-6
    assert made[1].tobytes() == states[1].tobytes()


def test_nothing_changes_without_weights() -> None:
    states = np.random.default_rng(0).standard_normal((2, 77, 6)).astype(np.float32)
    assert emphasised(states, [np.ones((2, 77), np.float32)], (6,)).tobytes() == states.tobytes()


@pytest.mark.parametrize("mean", [0.0, 1e-9, -1e-9])
def test_means_about_zero_do_not_scale(mean: float) -> None:
    """A layer norm that was never trained gives means of rounding errors: their quotient is noise, of either sign."""
    states = np.zeros((1, 77, 2), np.float32)
    states[0, :, 0], states[0, :, 1] = 1.0, -1.0 + mean
    states[0, 3, 1] = -1.5
    weights = np.ones((1, 77), np.float32)
    weights[0, 3] = 2.0
    states[0, 5] = (0.25, 0.25 + 77 * 2 * mean)
    made = emphasised(states, [weights], (2,))
    assert np.allclose(made[0, 3], states[0, 3] * 2) and np.allclose(made[0, 4], states[0, 4])


def test_a_chunk_of_nothing_stays_finite() -> None:
    made = emphasised(np.ones((1, 77, 2), np.float32), [np.zeros((1, 77), np.float32)], (2,))
    assert (made == 0).all()
