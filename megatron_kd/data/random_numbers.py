"""A 64-bit mixing function: the source of every seeded order in the data path.

Counter-based random numbers: a pure function of a sequence's seed and a position, so that a text depends neither on
the batch it is made in nor on the layout, and a resumed run needs no generator state but its counters.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

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


_DOUBLE_STEP = 2.0**-53


def sequence_seeds(seed: int, stream: str, numbers: np.ndarray) -> np.ndarray:
    """One 64-bit seed for each of ``numbers`` (chunk ids, say, or places in a run), uint64, any shape.

    Args:
        seed: of the run.
        stream: what the numbers are for; two streams of one run are independent.
    """
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little") ^ mix_int(seed)
    return mix64(np.asarray(numbers).astype(np.uint64) ^ np.uint64(mix_int(key)))


def uniforms(seeds: np.ndarray, positions: np.ndarray | int) -> Tensor:
    """Float64 numbers in [0, 1) for (seed, position) pairs, on the CPU."""
    counters = np.atleast_1d(np.asarray(positions)).astype(np.uint64) * np.uint64(GOLDEN)
    bits = mix64(np.asarray(seeds, dtype=np.uint64) ^ mix64(counters))
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * _DOUBLE_STEP)


def uniform(seed: int, stream: str, number: int) -> float:
    """One number in [0, 1): what a step draws to decide something."""
    return float(uniforms(sequence_seeds(seed, stream, np.array([number])), 0)[0])
