"""GPTQ rounding keeps a layer's output better than rounding to nearest, for the inputs that its Hessian saw."""

import numpy as np
import pytest
import torch
from torch import nn

from calibration.rounding.adaround import adaround
from calibration.rounding.gptq import Hessian, columns, gptq
from personalq.numerics import INT4, absmax_scale, quantize


def correlated_inputs(n: int = 400, k: int = 32, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((k, k)) * (generator.random((k, 1)) ** 3)
    return torch.from_numpy((generator.standard_normal((1, n, k)) @ mixing).astype(np.float32))


def output_error(x: torch.Tensor, weight: np.ndarray, integers: np.ndarray, scale: np.ndarray) -> float:
    restored = integers.astype(np.float32) * scale.reshape(-1, 1)
    return float(((x.numpy()[0] @ (weight - restored).T) ** 2).mean())


def test_output_error_is_well_below_nearest_roundings():
    weight = np.random.default_rng(1).standard_normal((16, 32)).astype(np.float32)
    scale, x = absmax_scale(weight, INT4, 0), correlated_inputs()
    hessian = Hessian.empty(nn.Linear(32, 16))
    hessian.add(x, None)
    learnt = output_error(x, weight, gptq(weight, scale, hessian, INT4, block=8), scale)
    nearest = output_error(x, weight, quantize(weight, scale, INT4, 0), scale)
    assert learnt < 0.6 * nearest


@pytest.mark.parametrize("learn", [gptq, adaround], ids=["GPTQ", "AdaRound"])
def test_scales_in_blocks_lose_less_than_one_per_channel(learn):
    uneven = np.where(np.arange(32) < 16, 1.0, 0.1)
    weight = (np.random.default_rng(1).standard_normal((16, 32)) * uneven).astype(np.float32)
    x = correlated_inputs()
    hessian = Hessian.empty(nn.Linear(32, 16))
    hessian.add(x, None)
    blocks = absmax_scale(weight.reshape(-1, 16), INT4, 0).reshape(16, 2)
    per_channel = absmax_scale(weight, INT4, 0)
    integers = learn(weight, blocks, hessian, INT4)
    restored = integers.astype(np.float32) * np.repeat(blocks, 16, axis=1)
    in_blocks = output_error(x, weight, restored, np.ones(16, np.float32))
    assert abs(integers).max() <= 8
    assert in_blocks < 0.8 * output_error(x, weight, learn(weight, per_channel, hessian, INT4), per_channel)


def test_weighted_samples_come_out_better_where_the_weights_are():
    weight = np.random.default_rng(1).standard_normal((16, 32)).astype(np.float32)
    scale, near, far = absmax_scale(weight, INT4, 0), correlated_inputs(seed=1), correlated_inputs(seed=2)
    x = torch.cat([near, far], dim=1)
    errors = {}
    for name, importance in (("even", 1.0), ("near", 50.0)):
        weights = torch.ones(1, 800)
        weights[:, :400] = importance
        hessian = Hessian.empty(nn.Linear(32, 16))
        hessian.add(x, weights)
        errors[name] = output_error(near, weight, gptq(weight, scale, hessian, INT4), scale)
    assert errors["near"] < errors["even"]


def test_integers_stay_inside_four_bits_and_dead_columns_become_zero():
    weight = np.full((4, 32), 100.0, np.float32)
    x = correlated_inputs()
    x[..., 5] = 0
    hessian = Hessian.empty(nn.Linear(32, 4))
    hessian.add(x, None)
    integers = gptq(weight, np.full(4, 1.0, np.float32), hessian, INT4)
    assert integers.dtype == np.int8
    assert integers.min() >= -8
    assert integers.max() <= 7
    assert not integers[:, 5].any()


@pytest.mark.parametrize("stride", [1, 2], ids=["stride 1", "stride 2"])
def test_unfolded_columns_times_the_weight_are_the_convolution(stride):
    conv = nn.Conv2d(4, 6, 3, padding=1, stride=stride, bias=False)
    x = torch.randn(2, 4, 8, 8)
    product = columns(conv, x) @ conv.weight.reshape(6, -1).T
    torch.testing.assert_close(product.transpose(1, 2).reshape(conv(x).shape), conv(x), rtol=1e-4, atol=1e-5)
