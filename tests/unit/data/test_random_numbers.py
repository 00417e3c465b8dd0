"""Numbers are those of splitmix64, uniform, and independent over seeds, streams and positions."""

import numpy as np

from megatron_kd.data.random_numbers import hash64, hash_int, sequence_seeds, uniform, uniforms


def test_known_values_of_splitmix64() -> None:
    """The first outputs of the published generator from state 0 are the hashes of 0, golden, 2·golden."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([0, golden, 2 * golden % 2**64], dtype=np.uint64)
    assert [hex(value) for value in hash64(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_integers_wrap_around() -> None:
    assert hash_int(0) == hash_int(2**64) == 0xE220A8397B1DCDAF
    assert hash_int(-1) == hash_int(2**64 - 1)


def test_uniform_numbers() -> None:
    seeds = sequence_seeds(3, "test", np.arange(300))
    numbers = np.stack([uniforms(seeds, position) for position in range(100)])
    assert 0 <= numbers.min() and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.01 and abs(numbers.var() - 1 / 12) < 0.003
    assert len(np.unique(numbers)) == numbers.size
    for other in (np.roll(numbers, 1, 0), np.roll(numbers, 1, 1)):
        correlation = np.corrcoef(numbers.flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 0.03


def test_streams_and_seeds_differ() -> None:
    first = [uniform(1, "gkd", step) for step in range(5)]
    assert first == [uniform(1, "gkd", step) for step in range(5)]
    assert first != [uniform(2, "gkd", step) for step in range(5)] != [uniform(1, "replay", step) for step in range(5)]
