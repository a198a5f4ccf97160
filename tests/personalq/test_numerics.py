"""The quantise/dequantise formula: its edges, its properties, its packing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from personalq.errors import SpecError
from personalq.numerics import (
    INT4,
    INT6,
    INT7,
    INT8,
    QTYPES,
    SMALLEST_SCALE,
    absmax_scale,
    check_finite,
    cosine,
    dequantize,
    fake_quantize,
    mse_scale,
    pack_int4,
    psnr_db,
    quantize,
    snr_db,
    unpack_int4,
)

FLOATS = st.floats(-100, 100, width=32)


@pytest.mark.parametrize(
    ("qtype", "low", "high"),
    [(INT8, -128, 127), (INT7, -64, 63), (INT6, -32, 31), (INT4, -8, 7)],
    ids=lambda value: str(value),
)
def test_types_hold_the_values_of_twos_complement(qtype: object, low: int, high: int) -> None:
    assert (qtype.qmin, qtype.qmax) == (low, high)  # type: ignore[attr-defined]


def test_types_are_found_by_name() -> None:
    assert QTYPES == {"int8": INT8, "int7": INT7, "int6": INT6, "int4": INT4}


def test_halves_round_to_even_and_values_outside_are_clipped() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1000, -1000], dtype=np.float32)
    assert quantize(x, 1.0, INT8).tolist() == [0, 2, 2, 0, -2, 127, -128]
    assert quantize(x, 1.0, INT4).tolist() == [0, 2, 2, 0, -2, 7, -8]


def test_a_scale_per_channel_acts_along_its_axis() -> None:
    x = np.array([[1.0, 2.0], [10.0, 20.0]], dtype=np.float32)
    rows, columns = absmax_scale(x, INT8, 0), absmax_scale(x, INT8, 1)
    assert np.allclose(rows * 127, [2, 20]) and np.allclose(columns * 127, [10, 20])
    assert quantize(x, rows, INT8, 0).tolist() == [[64, 127], [64, 127]]
    assert np.allclose(dequantize(quantize(x, rows, INT8, 0), rows, 0)[:, 1], [2, 20])


def test_a_channel_of_zeros_gets_the_smallest_scale() -> None:
    assert absmax_scale(np.array([[0.0], [1.0]], np.float32), INT8, 0)[0] == SMALLEST_SCALE
    assert SMALLEST_SCALE == np.float16(SMALLEST_SCALE) > 0


def test_only_zeros_are_refused() -> None:
    with pytest.raises(SpecError) as error:
        absmax_scale(np.zeros(3, np.float32), INT8, where="mid.to_q")
    expected = "mid.to_q: needs a value other than 0 to find a scale, got only zeros; leave it unquantised"
    assert str(error.value) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "inf"])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(SpecError) as error:
        check_finite(np.array([1.0, bad]), "mid.to_q")
    assert str(error.value) == "mid.to_q: values must be finite, got NaN or Inf; check the checkpoint's weights"


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (4, 6), elements=FLOATS).filter(lambda x: bool(np.abs(x).max() > 0.1)))
def test_the_error_is_at_most_half_a_step(x: np.ndarray) -> None:
    scale = absmax_scale(x, INT8)
    assert np.abs(fake_quantize(x, scale, INT8) - x).max() <= scale / 2 * 1.001


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (4, 6), elements=FLOATS).filter(lambda x: bool(np.abs(x).max() > 0.1)))
def test_integers_survive_a_second_trip(x: np.ndarray) -> None:
    scale = absmax_scale(x, INT8)
    q = quantize(x, scale, INT8)
    assert (quantize(dequantize(q, scale), scale, INT8) == q).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_more_bits_give_less_error_on_weights(seed: int, spread: float) -> None:
    """Normal values; on values that lie on a coarse grid, fewer bits may well be exact."""
    x = (np.random.default_rng(seed).standard_normal((8, 32)) * spread).astype(np.float32)
    errors = [float(((fake_quantize(x, mse_scale(x, t), t) - x) ** 2).sum()) for t in (INT4, INT6, INT7, INT8)]
    assert errors[0] > errors[1] > errors[2] > errors[3]


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (3, 16), elements=FLOATS).filter(lambda x: bool((np.abs(x).max(axis=1) > 0.1).all())))
def test_a_searched_scale_is_never_worse_than_absmax(x: np.ndarray) -> None:
    searched, widest = mse_scale(x, INT4, 0), absmax_scale(x, INT4, 0)
    errors = [((fake_quantize(x, scale, INT4, 0) - x) ** 2).sum(axis=1) for scale in (searched, widest)]
    assert (errors[0] <= errors[1] * 1.0001).all() and (searched <= widest).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33))
def test_int4_values_survive_packing(values: list[int]) -> None:
    q = np.array(values, dtype=np.int8)
    packed = pack_int4(q)
    assert len(packed) == (len(values) + 1) // 2
    assert (unpack_int4(packed, q.shape) == q).all()


def test_the_first_int4_value_lies_in_the_low_nibble() -> None:
    assert pack_int4(np.array([1, -1, 7], dtype=np.int8)).tolist() == [0xF1, 0x07]


def test_measures_of_equal_and_opposite_arrays() -> None:
    x = np.array([3.0, 4.0])
    assert snr_db(x, x) == psnr_db(x, x, peak=255) == float("inf")
    assert cosine(x, -x) == pytest.approx(-1) and cosine(x * 0, x) == 1.0
    assert snr_db(x, x * 0) == pytest.approx(0)
    assert psnr_db(np.zeros(4, np.uint8), np.full(4, 255, np.uint8), peak=255) == pytest.approx(0)
    assert snr_db(x, x * 1.1) == pytest.approx(20)
