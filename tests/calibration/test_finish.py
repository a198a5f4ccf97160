"""Tuning brings the quantised prediction nearer to the FP32 one and leaves the model alone; PTQD's part is found again."""

import pytest
import torch

from calibration.calibrate import CalibrateOptions, gather
from calibration.decide import decide, rule_of
from calibration.finish import correlated_part, rounded_layers
from calibration.tune import guide, tune


@pytest.fixture(scope="module")
def evidence(rex):
    return gather(rex, rex.card("rex"), CalibrateOptions(samples=2, steps=3))


def test_tuning_lowers_the_guided_error_and_leaves_the_model_as_it_was(evidence):
    unet = evidence.pipe.unet
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    decisions = decide(evidence, rule_of("rtn"), "w4a8")
    rounded = rounded_layers(evidence, decisions.layers, decisions.tensors)
    found = tune(unet, rounded, evidence.lessons, guidance=2.0, steps=30)
    assert found.after < 0.9 * found.before
    assert set(found.scales) == set(rounded)
    assert all((scale > 0).all() for scale in found.scales.values())
    for name, p in unet.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)
    assert not [m for m in unet.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_guiding_takes_pairs_in_order():
    pairs = torch.tensor([1.0, 3.0, 0.0, 2.0])
    torch.testing.assert_close(guide(pairs, 4.0), torch.tensor([9.0, 8.0]))


def test_the_correlated_part_and_the_mean_of_an_error_are_found_again():
    y = torch.randn(16, 4, 8, 8)
    mean = torch.tensor([0.1, -0.2, 0.0, 0.3]).reshape(1, 4, 1, 1)
    gain, shift = correlated_part(y - y.mean((0, 2, 3), keepdim=True), 0.05 * y + mean)
    assert gain == pytest.approx(0.05, abs=1e-3)
    torch.testing.assert_close(shift, mean.flatten() + 0.05 * y.mean((0, 2, 3)), atol=1e-3, rtol=0)
