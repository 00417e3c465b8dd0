import numpy as np

from megatron_kd.data.random_numbers import mix64, mix_int


def test_known_values_of_splitmix64() -> None:
    """The first outputs of the published generator from state 0 are the mix of 0, golden, 2·golden."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([0, golden, 2 * golden % 2**64], dtype=np.uint64)
    assert [hex(value) for value in mix64(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_integers_wrap_around() -> None:
    assert mix_int(0) == mix_int(2**64) == 0xE220A8397B1DCDAF
    assert mix_int(-1) == mix_int(2**64 - 1)
