"""Positive numbers as integers on a logarithmic scale: a constant relative error, and an exact zero."""

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LogCode:
    """Codes of ``bits`` bits for 0 and for the numbers from ``exp(lowest)`` to ``exp(highest)``.

    Code 0 is zero, code c is ``exp(lowest + (c - 1) * step)``; what lies outside is moved to the nearer end. The
    relative error is at most ``step / 2``.
    """

    bits: int
    lowest: float
    highest: float = 0.0

    @property
    def step(self) -> float:
        """Between the logarithms of neighbouring codes."""
        return (self.highest - self.lowest) / ((1 << self.bits) - 2)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """uint16 codes of float32 ``values`` >= 0, same shape."""
        values = np.asarray(values, dtype=np.float32)
        with np.errstate(divide="ignore"):
            scaled = np.log(values)
        scaled -= np.float32(self.lowest)
        scaled *= np.float32(1.0 / self.step)
        scaled += np.float32(1.5)
        np.clip(scaled, 1, (1 << self.bits) - 1, out=scaled)
        codes = scaled.astype(np.uint16)
        codes[values == 0] = 0
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """float32 values of ``codes``, same shape."""
        return self._table.take(codes)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        codes = np.arange(1 << self.bits, dtype=np.float64)
        table = np.exp(self.lowest + (codes - 1) * self.step).astype(np.float32)
        table[0] = 0.0
        return table
