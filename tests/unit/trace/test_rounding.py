"""Rounded floats: nearest, half to even, within the error that the format states."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lens.trace.rounding import BF16_BITS, SUM_BITS, keep_mantissa

# Normal float32 numbers; the largest binade rounds up to infinity, as in bfloat16 itself.
normal = st.one_of(
    st.floats(min_value=2.0**-126, max_value=2.0**127, width=32),
    st.floats(min_value=-(2.0**127), max_value=-(2.0**-126), width=32),
    st.just(0.0),
)
bits = st.sampled_from([BF16_BITS, SUM_BITS, 1, 22])


def by_hand(x: float, bits: int) -> float:
    """Python's `round` is half to even, and exact at these sizes."""
    mantissa, exponent = math.frexp(x)
    scale = 2 ** (bits + 1)
    return round(mantissa * scale) / scale * 2.0**exponent


@settings(max_examples=120, deadline=None)
@given(st.lists(normal, min_size=1, max_size=20), bits)
def test_rounds_to_the_nearest_with_these_bits_half_to_even(values: list[float], bits: int) -> None:
    got = keep_mantissa(np.array(values, np.float32), bits)
    assert got.dtype == np.float32
    assert got.tolist() == [by_hand(x, bits) for x in values]


@settings(max_examples=60, deadline=None)
@given(st.lists(normal, min_size=1, max_size=20))
def test_errors_are_as_stated(values: list[float]) -> None:
    exact = np.array(values, np.float32).astype(np.float64)
    for bits, error in ((BF16_BITS, 2**-8), (SUM_BITS, 2**-12)):
        assert (abs(keep_mantissa(exact, bits) - exact) <= error * abs(exact)).all()


def test_low_bits_are_zero_and_a_second_rounding_changes_nothing() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    rounded = keep_mantissa(values, SUM_BITS)
    low = np.uint32((1 << (23 - SUM_BITS)) - 1)
    assert (values.view(np.uint32) & low).any()
    assert not (rounded.view(np.uint32) & low).any()
    np.testing.assert_array_equal(keep_mantissa(rounded, SUM_BITS), rounded)


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF])
def test_nan_stays_nan_whatever_its_payload(payload: int) -> None:
    nan = np.array([payload], np.uint32).view(np.float32)
    assert np.isnan(keep_mantissa(nan, BF16_BITS)).all()


def test_infinities_and_the_sign_of_zero_stay() -> None:
    got = keep_mantissa(np.array([math.inf, -math.inf, -0.0]), BF16_BITS)
    assert got.tolist() == [math.inf, -math.inf, 0.0]
    assert np.signbit(got).tolist() == [False, True, True]


def test_leaves_its_argument_alone_and_keeps_the_shape() -> None:
    values = np.full((3, 2), 1.2345678, np.float32)
    before = values.copy()
    assert keep_mantissa(values[:, ::-1], BF16_BITS).shape == (3, 2)
    assert keep_mantissa(values[:0], BF16_BITS).shape == (0, 2)
    np.testing.assert_array_equal(values, before)
