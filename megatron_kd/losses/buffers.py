"""Large temporary buffers. On Linux CPUs they are asked to be backed by huge pages.

A fresh buffer's first touch otherwise faults once per 4 KiB. Smaller blocks are left alone: the C library keeps those
of up to 32 MiB for the next call, and advice on memory that is in use costs more than it brings. A :class:`Workspace`
keeps a call's buffers for the next one, which saves the faults as well.
"""

import ctypes
import functools
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

SMALLEST_ADVISED = (32 << 20) + 1


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, zero: bool = False) -> Tensor:
    """An empty (or zero) tensor."""
    buffer = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        _advise_huge_pages(buffer)
    return buffer.zero_() if zero else buffer


class Workspace:
    """Buffers that one owner's calls use one after another. On CUDA torch's allocator does this, so none are kept."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, valid until the same name is taken again."""
        if device.type != "cpu":
            return allocate(shape, dtype, device)
        size = torch.Size(shape).numel() * dtype.itemsize
        if name not in self._kept or self._kept[name].nbytes < size:
            self._kept.pop(name, None)  # before its successor is made
            self._kept[name] = allocate((size,), torch.uint8, device)
        return self._kept[name][:size].view(dtype).view(shape)


def _advise_huge_pages(buffer: Tensor) -> None:
    """Advice only: where the system does not take it nothing changes."""
    if buffer.nbytes < SMALLEST_ADVISED or _madvise() is None:
        return
    start = -(-buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (buffer.data_ptr() + buffer.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Any | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
