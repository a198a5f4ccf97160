"""Saved statistics come back equal, and only for what produced them."""

import dataclasses

import numpy as np

from calibration.calibrate import CalibrateOptions, calibrate, gather
from calibration.statistics.saved import NAME

FEW = CalibrateOptions(samples=2, steps=2, seed=5)


def test_a_reloaded_observation_gives_the_same_spec(rex):
    first = calibrate(rex, "rex", FEW)
    assert (first.spec_path.parent / NAME).is_file()
    evidence = gather(rex, rex.card("rex"), FEW)
    assert evidence.seen.samples == 2 * 2 * 2
    again = calibrate(rex, "rex", FEW, evidence=evidence)
    assert again.spec_file.content_sha256() == first.spec_file.content_sha256()


def test_another_seed_is_observed_anew(rex):
    calibrate(rex, "rex", FEW)
    other = gather(rex, rex.card("rex"), dataclasses.replace(FEW, seed=6))
    mine = gather(rex, rex.card("rex"), FEW)
    assert other.key != mine.key
    assert not np.array_equal(other.seen.points.sample.numpy(), mine.seen.points.sample.numpy())
