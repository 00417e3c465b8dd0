"""Arrays of integers of any width up to 31 bits, packed to the bit and unpacked without a loop.

A field of ``width`` bits is cut into planes by the binary digits of its width, the widest first: 18 bits are a plane of
16 and one of 2, 6 bits one of 4 and one of 2. The first plane holds the lowest bits. A plane of 16 or 8 bits is an
array of little-endian integers; in one of 4, 2 or 1 bits the first value is in the lowest bits of its byte. Every plane
ends on a whole byte.
"""

import functools

import numpy as np

MAX_WIDTH = 31
_PLANES = (16, 8, 4, 2, 1)


def width_for(largest: int) -> int:
    """Bits that hold every integer from 0 to ``largest``."""
    return max(1, int(largest).bit_length())


def packed_bytes(count: int, width: int) -> int:
    """Bytes of ``count`` fields of ``width`` bits."""
    return sum(-(-count * plane // 8) for plane in _planes(width))


def pack(values: np.ndarray, width: int) -> np.ndarray:
    """uint8 ``[packed_bytes(len(values), width)]`` of unsigned integers ``[n]`` below ``2 ** width``."""
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
    """What was packed: ``[count]`` of uint8, uint16 or uint32, the narrowest that holds ``width`` bits.

    Args:
        data: uint8, at least ``packed_bytes(count, width)`` of them; more are ignored.
    """
    dtype = np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint32
    result, shift, start = None, 0, 0
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
    return result


def _planes(width: int) -> tuple[int, ...]:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"fields of {width} bits; 1 to {MAX_WIDTH} are possible")
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
    """For each byte the values that it holds, one a byte, as one integer: a look-up unpacks several at a time."""
    per_byte = 8 // plane
    table = np.zeros((256, per_byte), np.uint8)
    for place in range(per_byte):
        table[:, place] = (np.arange(256) >> (plane * place)) & ((1 << plane) - 1)
    return table.view(f"<u{per_byte}").reshape(256)
