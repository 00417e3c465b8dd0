"""A file's bytes in pieces, decompressed: plain, gzip (all members) or zstandard (all frames), told by content."""

import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

from megatron_kd.errors import DataError

PIECE_BYTES = 1 << 20
_RAW_PIECE_BYTES = 64 << 10
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def compression_of(path: str) -> str | None:
    """``gzip``, ``zstandard`` or None; by the file's magic, else its extension."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    if head == _ZSTD_MAGIC:
        return "zstandard"
    if head and path.endswith(".gz"):
        return "gzip"
    return "zstandard" if head and path.endswith((".zst", ".zstd")) else None


def read_pieces(path: str, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[bytes, int]]:
    """Decompressed pieces of a file, each with the raw bytes read for it.

    Raises:
        DataError: a compressed file is truncated or damaged.
    """
    compression = compression_of(path)
    with open(path, "rb") as file:
        if compression == "gzip":
            yield from _decompress(path, file, _gzip_member, "gzip")
        elif compression == "zstandard":
            yield from _decompress(path, file, _zstd_frame, "zstandard")
        else:
            while piece := file.read(piece_bytes):
                yield piece, len(piece)


def read_line_range(path: str, start: int, stop: int, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[bytes, int]]:
    """Pieces of the lines of an uncompressed file that begin at byte ``start`` or later and before byte ``stop``."""
    with open(path, "rb") as file:
        place, end = _line_start(file, start), _line_start(file, stop)
        file.seek(place)
        while place < end and (piece := file.read(min(piece_bytes, end - place))):
            place += len(piece)
            yield piece, len(piece)


def lines_before(path: str, place: int) -> int:
    """How many lines of an uncompressed file begin before byte ``place``."""
    if place == 0:
        return 0
    count, left = 1, place - 1
    with open(path, "rb") as file:
        while left and (piece := file.read(min(PIECE_BYTES, left))):
            count += piece.count(b"\n")
            left -= len(piece)
    return count


def _line_start(file: BinaryIO, place: int) -> int:
    """Where the first line begins at ``place`` or later; the end of the file if none does."""
    if place == 0:
        return 0
    file.seek(place - 1)
    while piece := file.read(_RAW_PIECE_BYTES):
        found = piece.find(b"\n")
        if found >= 0:
            return file.tell() - len(piece) + found + 1
    return file.tell()


def _gzip_member() -> Any:
    return zlib.decompressobj(wbits=31)


def _zstd_frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


def _decompress(path: str, file: Any, new_stream: Any, name: str) -> Iterator[tuple[bytes, int]]:
    stream = None
    members = 0
    try:
        while raw := file.read(_RAW_PIECE_BYTES):
            size = len(raw)
            while raw:
                if stream is None:
                    if members and name == "gzip" and not (raw := raw.lstrip(b"\0")):
                        break  # zero padding after a member
                    stream = new_stream()
                piece = stream.decompress(raw)
                raw = b""
                if stream.eof:
                    raw, stream = stream.unused_data, None
                    members += 1
                yield piece, size
                size = 0
    except (zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}: damaged {name} data near byte {file.tell()} ({error}); copy it again") from None
    if stream is not None:
        raise DataError(f"{path}: truncated {name} file: its last frame does not end; copy it again")
