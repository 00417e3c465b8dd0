"""Packed fields come back, take the bytes that they say, and lie where the format says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_kd.teachers.cache.bit_packing import MAX_WIDTH, pack, packed_bytes, unpack, width_for


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
    with pytest.raises(ValueError, match="fields of 32 bits"):
        pack(np.zeros(1), 32)
