"""A 64-bit mixing function: the source of every seeded order in the data path."""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1


@np.errstate(over="ignore")  # arithmetic is modulo 2^64; NumPy warns of it where an array has no dimension
def mix64(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014), element by element over uint64."""
    values = values + np.uint64(GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mix_int(value: int) -> int:
    """:func:`mix64` of one integer, taken modulo 2^64."""
    return int(mix64(np.array([value & WORD], dtype=np.uint64))[0])
