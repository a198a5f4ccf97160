"""Tuning brings the quantised prediction nearer to the FP32 one and leaves the model alone; PTQD's part is found again."""

import pytest
import torch

from calibration.calibrate import CalibrateOptions, gather
from calibration.decide import decide, rule_of
from calibration.rounding import tune as tuning
from calibration.rounding.finish import correlated_part, rounded_layers
from calibration.rounding.tune import guide, tune
from calibration.statistics.harm import harm_by_time, parts


@pytest.fixture(scope="module")
def evidence(rex):
    return gather(rex, rex.card("rex"), CalibrateOptions(samples=2, steps=3))


def test_tuning_lowers_the_guided_error_and_leaves_the_model_as_it_was(evidence, monkeypatch):
    monkeypatch.setattr(tuning, "INTEGER_RATE", 2e-2)  # 80 steps are few: an integer must come half a step to move
    unet = evidence.pipe.unet
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    decisions = decide(evidence, rule_of("rtn"), "w4a8")
    rounded = rounded_layers(evidence, decisions.layers, decisions.tensors)
    found = tune(unet, rounded, evidence.lessons, guidance=2.0, steps=80)
    assert found.after < 0.9 * found.before
    assert set(found.scales) == set(rounded)
    assert all((scale > 0).all() for scale in found.scales.values())
    moved = {name: (found.integers[name] - layer.q).abs() for name, layer in rounded.items()}
    assert 0 < sum(int((m > 0).sum()) for m in moved.values()) < 0.05 * sum(m.numel() for m in moved.values())
    assert all(float(m.max()) <= 1 for m in moved.values())
    for name, p in unet.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)
    assert not [m for m in unet.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_what_is_tuned_is_stored_so_that_the_exporter_writes_what_was_tuned(evidence, monkeypatch):
    monkeypatch.setattr(tuning, "STEPS", 8)
    budget = sum(layer.weight.numel() for layer in evidence.seen.layers.values()) * 3 // 4
    decisions = decide(evidence, rule_of("taq"), "w4a8", budget)
    quantised = {name: layer for name, layer in decisions.layers.items() if layer.weight != "float"}
    assert {layer.weight for layer in quantised.values()} == {"int8", "int4"}
    for name, layer in quantised.items():
        assert layer.rounding == "stored"
        q = decisions.tensors[f"{name}.weight_q"]
        assert q.dtype == "int8" and q.shape == evidence.seen.layers[name].weight.shape
        assert layer.weight == "int8" or abs(q).max() <= 8


def test_harm_is_measured_for_every_step_and_the_last_by_itself(evidence):
    decisions = decide(evidence, rule_of("rtn"), "w4a8")
    harm = harm_by_time(evidence, rounded_layers(evidence, decisions.layers, decisions.tensors))
    scheduler = evidence.pipe.scheduler
    assert list(harm) == [float(t) for t in scheduler.timesteps]
    last = scheduler.timesteps[-1]
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    passed_on = scheduler.step(one, last, zero).prev_sample - scheduler.step(zero, last, zero).prev_sample
    assert harm[float(last)] == pytest.approx(float(passed_on) ** 2, rel=1e-3)  # nothing comes after it


def test_the_schedule_is_cut_into_parts_that_cover_it():
    for n in (1, 2, 3, 25, 50):
        assert [i for part in parts(n) for i in part] == list(range(n))
        assert parts(n)[-1] == range(n - 1, n)


def test_guiding_takes_pairs_in_order():
    pairs = torch.tensor([1.0, 3.0, 0.0, 2.0])
    torch.testing.assert_close(guide(pairs, 4.0), torch.tensor([9.0, 8.0]))


def test_the_correlated_part_and_the_mean_of_an_error_are_found_again():
    y = torch.randn(16, 4, 8, 8)
    mean = torch.tensor([0.1, -0.2, 0.0, 0.3]).reshape(1, 4, 1, 1)
    gain, shift = correlated_part(y - y.mean((0, 2, 3), keepdim=True), 0.05 * y + mean)
    assert gain == pytest.approx(0.05, abs=1e-3)
    torch.testing.assert_close(shift, mean.flatten() + 0.05 * y.mean((0, 2, 3)), atol=1e-3, rtol=0)
