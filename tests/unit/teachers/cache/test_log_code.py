"""Logarithmic codes keep zero, order and the stated relative error."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kd.teachers.cache.codec import LogCode

CODES = [LogCode(16, -32 * math.log(2)), LogCode(10, -16.0), LogCode(16, -20.0, 20.0)]


@given(st.sampled_from(CODES), st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_error_is_at_most_half_a_step(code, shares):
    values = np.exp(code.lowest + np.array(shares) * (code.highest - code.lowest)).astype(np.float32)
    decoded = code.decode(code.encode(values))
    assert np.abs(np.log(decoded.astype(np.float64)) - np.log(values.astype(np.float64))).max() <= code.step * 0.51


@pytest.mark.parametrize("code", CODES)
def test_every_code_is_its_own_round_trip_and_zero_is_exact(code):
    codes = np.arange(1 << code.bits, dtype=np.uint16)
    assert np.array_equal(code.encode(code.decode(codes)), codes)
    assert code.decode(np.array([0], np.uint16))[0] == 0.0
    assert code.encode(np.array([1e-38], np.float32))[0] == 1
    assert code.encode(np.array([1e38], np.float32))[0] == (1 << code.bits) - 1
