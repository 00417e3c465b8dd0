"""Random numbers without a state: a 64-bit hash of a seed and a counter.

Every seeded order, split and draw of the project comes from here. A number is a pure function of (seed, position), so a
result depends neither on batches nor on layouts, and a resumed run needs no generator state but its counters.
"""

import hashlib

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1
_DOUBLE_STEP = 2.0**-53


@np.errstate(over="ignore")  # arithmetic is modulo 2^64; NumPy warns of it where an array has no dimension
def hash64(values: np.ndarray) -> np.ndarray:
    """Hash uint64 values element by element: the finalizer of splitmix64 (Steele, Lea & Flood 2014), a bijection."""
    values = values + np.uint64(GOLDEN)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_int(value: int) -> int:
    """Return :func:`hash64` of one integer, taken modulo 2^64."""
    return int(hash64(np.array([value & WORD], dtype=np.uint64))[0])


def sequence_seeds(seed: int, stream: str, numbers: np.ndarray) -> np.ndarray:
    """Return one 64-bit seed for each of ``numbers`` (chunk ids, positions in a run), uint64 of the same shape.

    Args:
        seed: of the run.
        stream: what the numbers are for; two streams of one run are independent.
    """
    key = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little") ^ hash_int(seed)
    return hash64(np.asarray(numbers).astype(np.uint64) ^ np.uint64(hash_int(key)))


def uniforms(seeds: np.ndarray, positions: np.ndarray | int) -> np.ndarray:
    """Return a float64 number in [0, 1) for each (seed, position) pair."""
    counters = np.atleast_1d(np.asarray(positions)).astype(np.uint64) * np.uint64(GOLDEN)
    bits = hash64(np.asarray(seeds, dtype=np.uint64) ^ hash64(counters))
    return (bits >> np.uint64(11)).astype(np.float64) * _DOUBLE_STEP


def uniform(seed: int, stream: str, number: int) -> float:
    """Return one number in [0, 1): what a step draws to decide something."""
    return float(uniforms(sequence_seeds(seed, stream, np.array([number])), 0)[0])
