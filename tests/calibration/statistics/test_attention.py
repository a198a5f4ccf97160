"""Watching attention changes no output, and puts everything back."""

import pytest
import torch

from calibration.model.pipeline import cross_attention
from calibration.statistics.attention import TriggerMap, watching_attention
from tests.conftest import tiny_pipeline


def test_watching_sees_every_layer_and_changes_nothing():
    unet = tiny_pipeline().unet.eval()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 77, 32))
    before = [layer.processor for _, layer in cross_attention(unet)]
    seen = {}
    with torch.no_grad():
        expected = unet(*inputs).sample
        with watching_attention(unet, lambda index, probabilities: seen.setdefault(index, probabilities)):
            watched = unet(*inputs).sample
    torch.testing.assert_close(watched, expected, rtol=1e-4, atol=1e-5)
    assert sorted(seen) == list(range(len(before)))
    for probabilities in seen.values():
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))
    assert [layer.processor for _, layer in cross_attention(unet)] == before


def test_trigger_weights_have_mean_one_and_are_even_without_a_trigger():
    trigger_map, probabilities = TriggerMap(8), torch.rand(2, 4, 16, 77).softmax(-1)
    trigger_map.add(probabilities, [[], [3, 4]])
    weights = trigger_map.take()
    assert weights.shape == (2, 1, 8, 8)
    torch.testing.assert_close(weights[0], torch.ones(1, 8, 8))
    assert float(weights[1].mean()) == pytest.approx(1.0, abs=1e-5)
    assert float(weights[1].std()) > 0
