"""Counter-based random numbers: a pure function of a sequence's seed and a position, so that a text depends neither on
the batch it is made in nor on the layout, and a resumed run needs no generator state but its counters.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from megatron_kd.data.mixing import GOLDEN, mix64, mix_int

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
