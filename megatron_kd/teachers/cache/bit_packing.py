"""Numbers in few bits: integers of any width packed without gaps, and positive floats on a logarithmic scale.

An array of ``width``-bit integers is cut into planes by the binary digits of the width, the widest first: 18 bits are a
plane of 16 and one of 2, 6 bits one of 4 and one of 2. The first plane holds the lowest bits. A plane of 16 or 8 bits
is an array of little-endian integers; in one of 4, 2 or 1 bits the first value is in the lowest bits of its byte. Every
plane ends on a whole byte.
"""

import functools
from dataclasses import dataclass

import numpy as np

MAX_WIDTH = 31
_PLANES = (16, 8, 4, 2, 1)


def width_for(largest: int) -> int:
    """Return how many bits hold every integer from 0 to ``largest``."""
    return max(1, int(largest).bit_length())


def packed_bytes(count: int, width: int) -> int:
    """Return the bytes that ``count`` integers of ``width`` bits take."""
    return sum(-(-count * plane // 8) for plane in _planes(width))


def pack(values: np.ndarray, width: int) -> np.ndarray:
    """Pack unsigned integers [n] below ``2 ** width`` into uint8 [packed_bytes(n, width)]."""
    values = np.ascontiguousarray(values, dtype=np.uint32)
    parts, shift = [], 0
    for plane in _planes(width):
        part = values >> np.uint32(shift) if shift else values
        if plane >= 8:
            parts.append(part.astype(f"<u{plane // 8}").view(np.uint8))
        else:
            parts.append(_pack_plane(part.astype(np.uint8) & np.uint8((1 << plane) - 1), plane))
        shift += plane
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def unpack(data: np.ndarray, count: int, width: int) -> np.ndarray:
    """Invert :func:`pack`: [count] of uint8, uint16 or uint32, the narrowest that holds ``width`` bits.

    Args:
        data: uint8, at least ``packed_bytes(count, width)`` of them; more are ignored.
    """
    dtype = np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint32
    result: np.ndarray | None = None
    shift = start = 0
    for plane in _planes(width):
        size = -(-count * plane // 8)
        raw = data[start : start + size]
        if plane >= 8:
            part = np.frombuffer(raw, dtype=f"<u{plane // 8}")
        else:
            part = _spread(plane)[raw].view(np.uint8)[:count]
        if result is None:
            result = part.astype(dtype, copy=False)
        else:
            result = result | np.left_shift(part, dtype(shift), dtype=dtype)
        start, shift = start + size, shift + plane
    assert result is not None  # a width has a plane
    return result


def _planes(width: int) -> tuple[int, ...]:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"integers of {width} bits cannot be packed, only 1 to {MAX_WIDTH}")
    return tuple(plane for plane in _PLANES if width & plane)


def _pack_plane(part: np.ndarray, plane: int) -> np.ndarray:
    if plane == 1:
        return np.packbits(part, bitorder="little")
    per_byte = 8 // plane
    if len(part) % per_byte:
        part = np.concatenate([part, np.zeros(-len(part) % per_byte, np.uint8)])
    columns = part.reshape(-1, per_byte)
    packed = columns[:, 0].copy()
    for place in range(1, per_byte):
        packed |= columns[:, place] << np.uint8(plane * place)
    return packed


@functools.cache
def _spread(plane: int) -> np.ndarray:
    """Return for each byte its values, one per byte, as one integer: a look-up then unpacks several at a time."""
    per_byte = 8 // plane
    table = np.zeros((256, per_byte), np.uint8)
    for place in range(per_byte):
        table[:, place] = (np.arange(256) >> (plane * place)) & ((1 << plane) - 1)
    return table.view(f"<u{per_byte}").reshape(256)


@dataclass(frozen=True)
class LogQuantizer:
    """Integers of ``bits`` bits for 0 and for the numbers from ``exp(lowest)`` to ``exp(highest)``.

    Code 0 is zero, code c is ``exp(lowest + (c - 1) * step)``; numbers outside are clipped. The relative error is at
    most ``step / 2``.
    """

    bits: int
    lowest: float
    highest: float = 0.0

    @property
    def step(self) -> float:
        """Difference between the logarithms of neighbouring codes."""
        return (self.highest - self.lowest) / ((1 << self.bits) - 2)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Return the uint16 codes of float32 ``values`` >= 0, of the same shape."""
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
        """Return the float32 values of ``codes``, of the same shape."""
        return self._table.take(codes)

    @functools.cached_property
    def _table(self) -> np.ndarray:
        codes = np.arange(1 << self.bits, dtype=np.float64)
        table = np.exp(self.lowest + (codes - 1) * self.step).astype(np.float32)
        table[0] = 0.0
        return table
