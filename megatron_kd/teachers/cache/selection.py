"""From a teacher's hidden states to the ids that a codec keeps, without ever holding all logits.

    hidden [T, h] -> chunks of C tokens: logits [C, R] -> tiles of rows: exponentials -> the codec's ids -> numpy

R is this rank's part of the teacher's vocabulary. A tile is read several times, so on the CPU it is so small that it
stays in the processor's cache. Collectives over the tensor-parallel group, per chunk, which is one tile: the maximum
and the sum of the exponentials, what finds the ids (``largest.py``, ``drawing.py``), the probability outside of them.
Every rank of the group gets the same entries.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.errors import DataError
from megatron_kd.losses import OutputHead
from megatron_kd.losses.buffers import allocate
from megatron_kd.losses.chunk_terms import gather_columns, local_columns, row_max, row_tiles
from megatron_kd.losses.logits import HeadLogits
from megatron_kd.parallel.groups import sum_over_group
from megatron_kd.teachers.cache.codec import Codec, Entries
from megatron_kd.teachers.cache.drawing import block_sums, draw, uniform_numbers
from megatron_kd.teachers.cache.largest import largest_over_ranks

DEFAULT_CHUNK_BYTES = 640 << 20  # few chunks: each product reads all of the head's weight
TILE_ELEMENTS = 1 << 20  # numbers of a tile on the CPU


class Selection:
    """Chooses the ids of a codec from a teacher's distribution, softmax(logits / temperature).

    Args:
        codec: what to keep; its ``vocab_size`` is the head's ``valid_vocab_size``.
        head: the teacher's output layer on this rank.
        group: the tensor-parallel group over which the head is split; None for one rank.
        temperature: of the softmax.
        chunk_bytes: memory of a chunk of logits.
    """

    def __init__(
        self,
        codec: Codec,
        head: OutputHead,
        group: dist.ProcessGroup | None,
        temperature: float = 1.0,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        self.codec, self._head, self._group, self._temperature = codec, head, group, temperature
        self._columns = head.rows_below(codec.vocab_size)
        self._logits = HeadLogits(head, 0, self._columns)
        self._group_size = 1 if group is None else group.size()
        widest = -(-codec.vocab_size // self._group_size)  # alike on all ranks
        self._chunk_tokens = max(1, chunk_bytes // (4 * widest))
        self._in_tiles = self._group_size == 1 and not head.weight.is_cuda
        self._buffer: Tensor | None = None
        self._tile_buffer: Tensor | None = None

    @torch.no_grad()
    def __call__(self, hidden: Tensor, chunk_ids: np.ndarray, positions: np.ndarray) -> Entries:
        """The entries of T tokens. Collective over the tensor-parallel group.

        Args:
            hidden: [T, h], the same on every rank.
            chunk_ids, positions: int64 [T], root chunk id and place in the chunk of each token; these decide its draws.

        Raises:
            DataError: a logit is not finite.
        """
        parts, count = [], max(1, -(-len(hidden) // self._chunk_tokens))
        step = max(1, -(-len(hidden) // count))  # spread evenly
        for start in range(0, max(1, len(hidden)), step):
            logits = self._product(hidden[start : start + step])
            for tile in self._tiles(len(logits)):
                rows = slice(start + tile.start, start + tile.stop)
                parts.append(self._entries(logits[tile], chunk_ids[rows], positions[rows]))
        return _concatenate(parts)

    def _product(self, hidden: Tensor) -> Tensor:
        """[C, R] products of a chunk with the head's weight, in the buffer."""
        if self._buffer is None or len(self._buffer) < len(hidden):  # fresh memory costs as much as a pass over it
            self._buffer = allocate((len(hidden), self._columns), torch.float32, hidden.device)
        logits = self._buffer[: len(hidden)]
        self._logits.product(hidden.to(self._head.weight.dtype), logits)
        return logits

    def _tiles(self, rows: int) -> Iterable[slice]:
        if rows and self._in_tiles:
            return row_tiles(rows, self._columns, TILE_ELEMENTS)
        return [slice(0, rows)]

    def _entries(self, logits: Tensor, chunk_ids: np.ndarray, positions: np.ndarray) -> Entries:
        exponentials, sums, z = self._exponentials(logits)
        if self.codec.name == "sampled":
            return self._drawn(exponentials, sums, z, chunk_ids, positions)
        return self._largest(exponentials, z)

    def _exponentials(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n, R] exp(logit / T) by a factor of each row's own, their sums in blocks, and [n] in all, as fp64."""
        self._logits.finish(logits)
        if self._temperature != 1.0:
            logits.div_(self._temperature)
        if self._in_tiles:
            exponentials = torch.softmax(logits, -1, out=self._room_for(logits))  # one pass over memory, not four
        else:
            exponentials = self._shifted_exponentials(logits)
        sums = block_sums(exponentials)
        z = self._over_ranks(_total(sums))
        if not bool(torch.isfinite(z).all()):
            raise DataError("the teacher's logits are not finite: is the model damaged, or its precision too low?")
        return exponentials, sums, z

    def _room_for(self, like: Tensor) -> Tensor:
        if self._tile_buffer is None or len(self._tile_buffer) < len(like):
            self._tile_buffer = allocate(tuple(like.shape), like.dtype, like.device)
        return self._tile_buffer[: len(like)]

    def _shifted_exponentials(self, logits: Tensor) -> Tensor:
        """exp(logit - max over all ranks), in place."""
        maxima = row_max(logits)
        if self._group_size > 1:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self._group)
        return logits.sub_(maxima.unsqueeze(1)).exp_()

    def _over_ranks(self, values: Tensor) -> Tensor:
        return values if self._group is None else sum_over_group(values, self._group)

    def _largest(self, exponentials: Tensor, z: Tensor) -> Entries:
        count = min(self.codec.max_ids, self.codec.vocab_size)
        found, ids = largest_over_ranks(exponentials, self._head.vocab_start, count, self._group)
        tail = self._outside(exponentials, ids) / z
        probabilities = found.double() / z.unsqueeze(1)
        counts = torch.full_like(z, count, dtype=torch.long)
        if self.codec.name == "top_p":
            counts = (probabilities.cumsum(-1) < self.codec.top_p).sum(-1).add_(1).clamp_max_(count)
        kept = torch.arange(count, device=z.device) < counts.unsqueeze(1)
        tail += torch.where(kept, 0.0, probabilities).sum(-1)
        return Entries(
            counts=counts.cpu().numpy(),
            ids=ids[kept].cpu().numpy().astype(np.uint32),
            tail=tail.float().cpu().numpy(),
            probabilities=probabilities[kept].float().cpu().numpy(),
        )

    def _drawn(
        self, exponentials: Tensor, sums: Tensor, z: Tensor, chunk_ids: np.ndarray, positions: np.ndarray
    ) -> Entries:
        numbers = uniform_numbers(self.codec.seed, chunk_ids, positions, self.codec.max_ids)
        exponent = self.codec.proposal_exponent
        proposal, known = (exponentials, sums) if exponent == 1.0 else (exponentials.pow(exponent), None)
        uniforms = torch.from_numpy(numbers).to(z.device)
        ids, total = draw(proposal, uniforms, self._head.vocab_start, self._group, known)
        ids = ids.sort(-1).values
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        importance = None
        if self.codec.is_weighted:
            chosen = self._at(exponentials, ids).double()
            ratio = chosen / z.unsqueeze(1) * total.unsqueeze(1) / self._at(proposal, ids).double()
            importance = ratio[first].float().cpu().numpy()
        tail = self._outside(exponentials, ids) / z
        starts = np.flatnonzero(first.reshape(-1).cpu().numpy())
        return Entries(
            counts=first.sum(-1).cpu().numpy(),
            ids=ids[first].cpu().numpy().astype(np.uint32),
            tail=tail.float().cpu().numpy(),
            draws=np.diff(starts, append=first.numel()).astype(np.uint16),
            importance=importance,
        )

    def _at(self, values: Tensor, ids: Tensor) -> Tensor:
        """[C, N] the columns ``ids`` of values that are split over the ranks."""
        columns, owned = local_columns(ids, self._head.vocab_start, self._columns)
        return self._over_ranks(torch.where(owned, gather_columns(values, columns), 0.0))

    def _outside(self, exponentials: Tensor, ids: Tensor) -> Tensor:
        """[C] fp64 sum of the exponentials of all other ids; sets those of ``ids`` to zero."""
        columns, owned = local_columns(ids, self._head.vocab_start, self._columns)
        if self._columns:
            zero_where_owned = torch.where(owned, 0.0, torch.inf).to(exponentials.dtype)
            exponentials.scatter_reduce_(-1, columns, zero_where_owned, "amin")
        return self._over_ranks(_total(block_sums(exponentials)))


def _total(sums: Tensor) -> Tensor:
    """[n] fp64 of sums in blocks: fp32 inside them is as exact and much faster than fp64 throughout."""
    return sums.sum(-1, dtype=torch.float64)


def _concatenate(parts: list[Entries]) -> Entries:
    if len(parts) == 1:
        return parts[0]
    columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    return Entries(**{name: None if part[0] is None else np.concatenate(part) for name, part in columns.items()})
