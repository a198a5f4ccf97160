"""Sharing out a byte budget: exact on cases that can be checked by hand, and refused when it cannot be met."""

from itertools import product

import numpy as np
import pytest

from calibration.rounding.allocate import allocate
from personalq.errors import SpecError

BYTES = {"a": {"float": 20, "int8": 10, "int4": 5}, "b": {"float": 40, "int8": 20, "int4": 10}}
HARM = {"a": {"float": 0.0, "int8": 1.0, "int4": 9.0}, "b": {"float": 0.0, "int8": 1.0, "int4": 2.0}}


def test_bytes_go_where_they_save_the_most_harm():
    assert allocate(BYTES, HARM, 20) == {"a": "int8", "b": "int4"}


def test_a_generous_budget_keeps_everything_wide():
    assert allocate(BYTES, HARM, 1000) == {"a": "float", "b": "float"}


def test_it_equals_a_full_search_on_random_cases():
    generator = np.random.default_rng(0)
    for _ in range(10):
        layers = [f"l{i}" for i in range(5)]
        sizes = {
            n: dict(zip(("float", "int8", "int4"), map(int, s * np.array([4, 2, 1])), strict=True))
            for n, s in zip(layers, generator.integers(3, 30, 5), strict=True)
        }
        harms = {
            n: {"float": 0.0, "int8": float(h), "int4": float(h * 9)}
            for n, h in zip(layers, generator.random(5), strict=True)
        }
        budget = int(sum(s["int8"] for s in sizes.values()) * 0.8)
        taken = allocate(sizes, harms, budget)
        every = product(("float", "int8", "int4"), repeat=5)
        fits = [c for c in every if sum(sizes[n][w] for n, w in zip(layers, c, strict=True)) <= budget]
        best = min(sum(harms[n][w] for n, w in zip(layers, c, strict=True)) for c in fits)
        assert sum(harms[n][taken[n]] for n in layers) == pytest.approx(best, rel=1e-3)
        assert sum(sizes[n][taken[n]] for n in layers) <= budget


def test_a_budget_below_the_smallest_widths_is_refused():
    with pytest.raises(
        SpecError, match="budget: must be at least 15 bytes for these layers at their smallest widths, got 14"
    ):
        allocate(BYTES, HARM, 14)
