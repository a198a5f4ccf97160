"""Balances: SmoothQuant's formula, one factor per shortcut half, and the low-rank part that SVD calls best."""

import numpy as np
import torch
from torch import nn

from calibration.rounding.balance import balanced_hessian, low_rank, shortcut, skip_channels, smooth
from calibration.rounding.gptq import Hessian
from tests.conftest import tiny_pipeline


def test_smoothing_is_the_square_root_of_activation_over_weight():
    weight = np.array([[1.0, 4.0], [-2.0, 1.0]], np.float32)
    np.testing.assert_allclose(smooth(np.array([8.0, 1.0], np.float32), weight), [1.0, 0.25], rtol=1e-6)


def test_a_channel_that_was_never_seen_gets_a_small_factor_not_zero():
    assert smooth(np.array([8.0, 0.0], np.float32), np.ones((2, 2), np.float32)).min() > 0


def test_each_half_of_a_shortcut_has_one_factor():
    factors = shortcut(np.array([1, 4, 2, 8, 3], np.float32), skip=2)
    np.testing.assert_allclose(factors, [0.5, 0.5, 0.5, 1.0, 1.0])


def test_skip_channels_are_those_the_unet_really_concatenates():
    unet = tiny_pipeline().unet
    seen: dict[str, int] = {}
    last = {"skip": 0}

    def note_block(block: nn.Module, args: tuple, kwargs: dict) -> None:
        last["skips"] = [s.shape[1] for s in kwargs["res_hidden_states_tuple"]]

    def note_resnet(name: str):
        def note(*_) -> None:
            seen[f"{name}.conv1"] = last["skips"].pop()

        return note

    for i, block in enumerate(unet.up_blocks):
        block.register_forward_pre_hook(note_block, with_kwargs=True)
        for j, resnet in enumerate(block.resnets):
            resnet.register_forward_pre_hook(note_resnet(f"up_blocks.{i}.resnets.{j}"))
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), torch.tensor([1]), torch.zeros(1, 77, 32))
    found = skip_channels(unet)
    assert seen == {name: found[name] for name in seen}
    assert len(seen) == 4


def test_a_balanced_hessian_is_that_of_the_divided_input():
    x, vector = torch.randn(50, 6), np.array([0.5, 1.0, 0.25], np.float32)
    divided = x / torch.from_numpy(vector).repeat_interleave(2)
    torch.testing.assert_close(balanced_hessian(Hessian(x.T @ x, 50.0), vector).total, divided.T @ divided)


def test_low_rank_part_leaves_the_smallest_rest():
    weight = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)
    down, up = low_rank(weight, 3)
    assert (down.shape, up.shape, down.dtype) == ((12, 3), (3, 8), np.float16)
    rest = np.linalg.norm(weight - (down.astype(np.float32) @ up.astype(np.float32)).T)
    best = np.sqrt((np.linalg.svd(weight, compute_uv=False)[3:] ** 2).sum())
    assert rest < 1.001 * best
