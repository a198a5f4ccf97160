"""AdaRound only chooses between floor and ceiling, and keeps a layer's output better than rounding to nearest."""

import numpy as np
import torch
from torch import nn

from calibration.rounding.adaround import adaround
from calibration.rounding.gptq import Hessian
from personalq.numerics import INT4, absmax_scale, quantize


def correlated_inputs(n: int = 400, k: int = 32) -> torch.Tensor:
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((k, k)) * (generator.random((k, 1)) ** 3)
    return torch.from_numpy((generator.standard_normal((1, n, k)) @ mixing).astype(np.float32))


def output_error(x: torch.Tensor, weight: np.ndarray, integers: np.ndarray, scale: np.ndarray) -> float:
    restored = integers.astype(np.float32) * scale.reshape(-1, 1)
    return float(((x.numpy()[0] @ (weight - restored).T) ** 2).mean())


def test_output_error_is_below_nearest_roundings_and_every_integer_is_a_neighbour():
    weight = np.random.default_rng(1).standard_normal((16, 32)).astype(np.float32)
    scale, x = absmax_scale(weight, INT4, 0), correlated_inputs()
    hessian = Hessian.empty(nn.Linear(32, 16))
    hessian.add(x, None)
    integers = adaround(weight, scale, hessian, INT4)
    learnt = output_error(x, weight, integers, scale)
    nearest = output_error(x, weight, quantize(weight, scale, INT4, 0), scale)
    assert learnt < 0.8 * nearest
    exact = weight / scale[:, None]
    assert np.all((integers == np.floor(exact)) | (integers == np.ceil(exact)))


def test_a_hopeless_start_falls_back_to_nearest():
    weight = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)
    scale = absmax_scale(weight, INT4, 0)
    integers = adaround(weight, scale, Hessian(torch.eye(8), 1.0), INT4)
    np.testing.assert_array_equal(integers, quantize(weight, scale, INT4, 0))
