"""Packed integers come back, in the stated bytes and places; logarithmic codes have the stated error."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kd.teachers.cache.bit_packing import MAX_WIDTH, LogQuantizer, pack, packed_bytes, unpack, width_for

CODES = [LogQuantizer(16, -32 * math.log(2)), LogQuantizer(10, -16.0), LogQuantizer(16, -20.0, 20.0)]


@given(st.integers(1, MAX_WIDTH), st.integers(0, 70), st.integers(0, 2**32))
def test_round_trip(width, count, seed):
    values = np.random.default_rng(seed).integers(0, 1 << width, count, dtype=np.uint32)
    packed = pack(values, width)
    assert packed.dtype == np.uint8 and len(packed) == packed_bytes(count, width)
    assert len(packed) * 8 < count * width + 8 * bin(width).count("1")
    trailed = np.concatenate([packed, np.full(3, 255, np.uint8)])
    assert unpack(trailed, count, width).tolist() == values.tolist()


def test_eighteen_bits_are_a_plane_of_sixteen_and_one_of_two():
    packed = pack(np.array([0x2ABCD, 0x1FFFF, 0x30000]), 18)
    assert packed.tolist() == [0xCD, 0xAB, 0xFF, 0xFF, 0x00, 0x00, 0b110110]


@pytest.mark.parametrize(("largest", "width"), [(0, 1), (1, 1), (255, 8), (256, 9), (151_935, 18), (2**20 - 1, 20)])
def test_width_follows_the_largest_value(largest, width):
    assert width_for(largest) == width


def test_no_such_width():
    with pytest.raises(ValueError, match="integers of 32 bits"):
        pack(np.zeros(1), 32)


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
