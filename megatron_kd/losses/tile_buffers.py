"""Memory of a tile: how many tokens a byte budget holds and in which dtypes, buffers, and the products that fill them.

The byte budget of a call is everything that grows with C or R beside inputs, gradients and rows of n numbers. A quarter
of it, at most 32 MiB, is for temporaries (of the divergence, and of the weight gradient of 16-bit weights); the rest is
for the C tokens of a tile, whose bytes for each of the C * R logits :func:`bytes_per_logit` counts:

    fp32                            4 (student) + 4 (teacher)
    16-bit, one rank on CPU         2 + 2, widened in blocks of rows
    16-bit, several ranks or CUDA   4 + 4, and 2 for the product or the gradient in 16 bits
    16-bit, Triton, plain heads     2 + 2, read and written by the kernels (scale, bias and softcap need 4 + 4 + 2)
    heads of different dtypes       4 + 4 (8 + 8 if one is fp64), and those of the wider product or gradient in its own

A tile has one token at least, whatever the budget. No collectives.
"""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_kd.errors import ConfigError
from megatron_kd.losses.types import OutputHead

MOST_TEMPORARIES = 8  # blocks that are alive at a time in the divergence with the most of them, a mixture
LARGEST_BLOCK = 1 << 20  # numbers; beyond, a block leaves the processor's cache
SMALLEST_ADVISED = (32 << 20) + 1  # bytes; the C library keeps smaller freed blocks itself
MATMUL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CPU_COLUMN_BLOCK, CPU_ROWS_OF_WHOLE_PRODUCTS = 1536, 1536
LOGIT_FLOOR = -1.0e5  # a logit whose bias is -inf: its probability is exactly 0, and 0 * LOGIT_FLOOR is 0


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and statistics for a head of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_narrow(dtype: torch.dtype) -> bool:
    """Return whether logits are widened from this dtype."""
    return dtype in (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TileDtypes:
    """Dtypes of a tile's logits.

    Attributes:
        stored: in the tile's buffers.
        evaluated: of the rows that a divergence sees; where it is wider, logits are widened in blocks of rows.
    """

    stored: torch.dtype
    evaluated: torch.dtype

    @staticmethod
    def of(weights: Sequence[torch.dtype], *, kernels_read_narrow: bool, widens_by_block: bool) -> "TileDtypes":
        """Choose the dtypes for heads whose weights have the dtypes ``weights``.

        Args:
            kernels_read_narrow: kernels take 16-bit logits as they are.
            widens_by_block: 16-bit logits may be widened in blocks of rows (one rank on a CPU).
        """
        if len(set(weights)) == 1 and is_narrow(weights[0]):
            if kernels_read_narrow:
                return TileDtypes(weights[0], weights[0])
            if widens_by_block:
                return TileDtypes(weights[0], torch.float32)
        wide = torch.float64 if torch.float64 in weights else work_dtype(weights[0])
        return TileDtypes(wide, wide)

    @property
    def by_block(self) -> bool:
        """Whether a tile's logits are widened in blocks of rows."""
        return self.stored != self.evaluated


def bytes_per_logit(weights: Sequence[torch.dtype], stored: torch.dtype) -> int:
    """Return the bytes of buffers for each (token, row of this rank), all models together.

    ``weights`` are the heads' dtypes. One product or gradient in a weight's own dtype is alive beside the tile where
    that differs from ``stored``.
    """
    own = max((weight.itemsize for weight in weights if weight != stored), default=0)
    return stored.itemsize * len(weights) + own


@dataclass(frozen=True)
class TilePlan:
    """Sizes of one call's tiles.

    Attributes:
        tokens: C, tokens per tile.
        block_elements: numbers per temporary.
        temporary_bytes: bytes of all temporaries together.
    """

    tokens: int
    block_elements: int
    temporary_bytes: int

    @staticmethod
    def of(budget: int, tokens: int, rows: int, number_bytes: int, logit_bytes: int) -> "TilePlan":
        """Divide a byte budget.

        Args:
            budget: bytes.
            tokens: tokens of the call, spread evenly over the tiles.
            rows: padded rows of the student's weight, so that all ranks plan alike.
            number_bytes: bytes of a number in temporaries.
            logit_bytes: see :func:`bytes_per_logit`.
        """
        temporary = min(budget // 4, MOST_TEMPORARIES * LARGEST_BLOCK * number_bytes)
        longest = max(1, (budget - temporary) // max(1, logit_bytes * rows))
        tiles = max(1, -(-tokens // longest))
        return TilePlan(
            tokens=max(1, -(-tokens // tiles)),
            block_elements=max(1, temporary // (MOST_TEMPORARIES * number_bytes)),
            temporary_bytes=temporary,
        )

    def tiles(self, tokens: int) -> Iterator[slice]:
        """Yield the slices of ``tokens`` tokens, one per tile."""
        for start in range(0, tokens, self.tokens):
            yield slice(start, min(start + self.tokens, tokens))


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, zero: bool = False) -> Tensor:
    """Return an empty (or zero) tensor; on Linux CPUs a large one is asked to be backed by huge pages.

    The first touch of a fresh buffer otherwise faults once per 4 KiB. Smaller ones are left alone: advice on memory in
    use costs more than it brings.
    """
    buffer = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        _advise_huge_pages(buffer)
    return buffer.zero_() if zero else buffer


class Workspace:
    """Buffers that one owner's calls use one after another. On CUDA torch's allocator does this, so none are kept."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor, valid until the same name is taken again."""
        if device.type != "cpu":
            return allocate(shape, dtype, device)
        size = torch.Size(shape).numel() * dtype.itemsize
        if name not in self._kept or self._kept[name].nbytes < size:
            self._kept.pop(name, None)  # before its successor is made
            self._kept[name] = allocate((size,), torch.uint8, device)
        return self._kept[name][:size].view(dtype).view(shape)


def _advise_huge_pages(buffer: Tensor) -> None:
    madvise = _madvise()
    if buffer.nbytes < SMALLEST_ADVISED or madvise is None:
        return
    start = -(-buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (buffer.data_ptr() + buffer.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)


class HeadLogits:
    """Logits of the columns ``first_row .. first_row + rows - 1`` of a head, written into given buffers.

    The matrix product runs in the head's dtype; everything after it is fp32 (fp64 for fp64 heads). For a 16-bit head on
    CPU the product is 16-bit too, as in the model itself, and is widened; on CUDA it is written in fp32.
    """

    def __init__(self, head: OutputHead, first_row: int, rows: int) -> None:
        if head.weight.dtype not in MATMUL_DTYPES:
            raise ConfigError(f"an output head's weight must be floating point, not {head.weight.dtype}")
        self.weight = head.weight.detach()[first_row : first_row + rows]
        self.bias = None if head.bias is None else head.bias.detach()[first_row : first_row + rows]
        self.scale = head.scale
        self.softcap = head.final_softcap

    def product(self, hidden: Tensor, out: Tensor) -> None:
        """Write hidden [n, h] @ weight.T to ``out`` [n, R], in out's dtype."""
        own = self.weight.dtype
        if out.dtype == own:
            for columns in self._column_blocks(out):
                torch.mm(hidden, self.weight[columns].t(), out=out[:, columns])
        elif out.device.type == "cuda" and is_narrow(own) and out.dtype == torch.float32:
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            out.copy_(torch.mm(hidden, self.weight.t()))

    def finish(self, logits: Tensor) -> None:
        """Apply bias, scale and softcap to ``logits`` [n, R], in place."""
        if self.bias is not None:
            logits.add_(self.bias).clamp_min_(LOGIT_FLOOR)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def _column_blocks(self, out: Tensor) -> list[slice]:
        columns = self.weight.shape[0]
        if out.device.type != "cpu" or len(out) >= CPU_ROWS_OF_WHOLE_PRODUCTS:
            return [slice(0, columns)]
        # few rows: the parts of the weight that a CPU's product copies stay in its cache from one use to the next
        return [slice(start, min(columns, start + CPU_COLUMN_BLOCK)) for start in range(0, columns, CPU_COLUMN_BLOCK)]


@dataclass
class TileLogits:
    """Logits of one model: its hidden states [n, h], the head's columns, and the buffer [C, R] of a tile."""

    hidden: Tensor
    head: HeadLogits
    buffer: Tensor

    def multiply(self, rows: slice) -> Tensor:
        """Fill the buffer with the matrix products of the tokens ``rows`` and return that part of it."""
        products = self.buffer[: rows.stop - rows.start]
        self.head.product(self.hidden[rows], products)
        return products

    def finish(self, block: slice, dtype: torch.dtype) -> Tensor:
        """Return the logits of the buffer's rows ``block`` in ``dtype``: the buffer itself where it has that dtype."""
        logits = self.buffer[block].to(dtype)
        self.head.finish(logits)
        return logits
