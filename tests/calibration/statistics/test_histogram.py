"""The streaming histogram: flat memory, growing range, clips that a full search over the raw values agrees with."""

import numpy as np
import pytest
import torch

from calibration.statistics.histogram import BINS, Histogram
from personalq.errors import SpecError
from personalq.numerics import INT4, INT8, SMALLEST_SCALE, fake_quantize


def filled(*arrays: np.ndarray) -> Histogram:
    histogram = Histogram.empty()
    for array in arrays:
        histogram.add(torch.from_numpy(array), "layer")
    return histogram


def test_range_grows_and_no_value_is_lost():
    histogram = filled(np.full(10, 0.5, np.float32), np.full(7, 40.0, np.float32))
    assert histogram.absmax == 40.0
    assert histogram.counts.sum() == 17
    assert histogram.counts.size == BINS


def test_percentile_finds_the_bulk_under_an_outlier():
    x = np.concatenate([np.random.default_rng(0).uniform(-1, 1, 100_000), [50.0]]).astype(np.float32)
    assert filled(x).percentile(99.9) == pytest.approx(1.0, abs=0.1)


def test_mse_clip_is_near_the_best_of_a_direct_search():
    x = np.random.default_rng(0).standard_t(4, 50_000).astype(np.float32)
    histogram = filled(x)
    for qtype in (INT8, INT4):
        clips = np.linspace(1.0, 0.05, 200) * histogram.absmax
        errors = [float(((fake_quantize(x, clip / qtype.qmax, qtype) - x) ** 2).mean()) for clip in clips]
        found = histogram.mse_clip(qtype)
        error = float(((fake_quantize(x, found / qtype.qmax, qtype) - x) ** 2).mean())
        assert error <= 1.1 * min(errors), qtype.name


def test_absmax_scale_maps_the_largest_value_to_qmax():
    x = np.array([-3.0, 1.0], np.float32)
    assert filled(x).scale(INT8, "absmax", "layer") == pytest.approx(3.0 / 127)


def test_merging_keeps_every_count_and_the_largest_value():
    a, b = filled(np.ones(5, np.float32)), filled(np.full(3, 9.0, np.float32))
    merged = a.merged(b)
    assert merged.counts.sum() == 8
    assert merged.absmax == 9.0


def test_tiny_activations_get_the_smallest_scale_fp16_can_hold():
    assert filled(np.full(4, 1e-9, np.float32)).scale(INT8, "absmax", "layer") == SMALLEST_SCALE


def test_only_zeros_are_refused_with_the_layers_name():
    with pytest.raises(SpecError, match=r"mid\.conv: needs an activation other than 0, got only zeros; add prompts"):
        filled(np.zeros(4, np.float32)).scale(INT8, "mse", "mid.conv")


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
def test_values_that_are_not_finite_are_refused_with_the_layers_name(bad):
    with pytest.raises(SpecError, match="conv_in: activations must be finite, got NaN or Inf"):
        Histogram.empty().add(torch.tensor([1.0, bad]), "conv_in")
