"""From a teacher's hidden states to the ids that a codec keeps, without ever holding all logits.

    hidden [T, h] -> chunks of C tokens: logits [C, R] -> statistics of blocks of ids -> the codec's ids -> numpy

R is this rank's part of the teacher's vocabulary. All of a chunk's logits are read once (``blocks.py``); the ids are
then looked for in the few blocks that can hold them, in groups of rows. Collectives over the tensor-parallel group:
the maximum and the sum of the exponentials per chunk; per group of rows what finds the ids (``largest.py``,
``drawing.py``) and the probability outside of them. Every rank of the group gets the same entries.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.errors import DataError
from megatron_kd.losses import OutputHead
from megatron_kd.losses.tile_buffers import HeadLogits, Workspace
from megatron_kd.losses.tile_terms import local_columns, row_blocks
from megatron_kd.parallel.groups import sum_over_group
from megatron_kd.teachers.cache.codec import Codec, Entries
from megatron_kd.teachers.cache.vocabulary_search import (
    BLOCK,
    NO_LOGIT,
    LogitBlocks,
    blocks_of,
    draw,
    largest_over_ranks,
    measure_blocks,
    over_ranks,
    uniform_numbers,
)

DEFAULT_TILE_BYTES = 640 << 20  # few tiles: each product reads all of the head's weight
CPU_ROWS_AT_ONCE = 64  # tokens whose blocks are searched together; on CUDA all of a chunk


class Selection:
    """Chooses the ids of a codec from a teacher's distribution, softmax(logits / temperature).

    Args:
        codec: what to keep; its ``vocab_size`` is the head's ``valid_vocab_size``.
        head: the teacher's output layer on this rank.
        group: the tensor-parallel group over which the head is split; None for one rank.
        temperature: of the softmax.
        tile_bytes: memory of a tile of logits.
    """

    def __init__(
        self,
        codec: Codec,
        head: OutputHead,
        group: dist.ProcessGroup | None,
        temperature: float = 1.0,
        tile_bytes: int = DEFAULT_TILE_BYTES,
    ) -> None:
        self.codec, self._head, self._group, self._temperature = codec, head, group, temperature
        self._columns = head.rows_below(codec.vocab_size)
        self._logits = HeadLogits(head, 0, self._columns)
        widest = -(-codec.vocab_size // (1 if group is None else group.size()))  # alike on all ranks
        self._chunk_tokens = max(1, tile_bytes // (4 * BLOCK * blocks_of(widest)))
        self._workspace = Workspace()  # fresh memory costs as much as a pass over it

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
            chunk = self._measured(hidden[start : start + step])
            for rows in self._groups_of_rows(len(chunk.peak)):
                of_all = slice(start + rows.start, start + rows.stop)
                parts.append(self._entries(chunk.rows(rows), chunk_ids[of_all], positions[of_all]))
        return _concatenate(parts)

    def _measured(self, hidden: Tensor) -> LogitBlocks:
        """softmax(logits / T) of [C, h], valid until the next call."""
        shape = (len(hidden), BLOCK * blocks_of(self._columns))
        logits = self._workspace.take("logits", shape, torch.float32, hidden.device)
        own = logits[:, : self._columns]
        self._logits.product(hidden.to(self._head.weight.dtype), own)
        logits[:, self._columns :] = NO_LOGIT
        self._logits.finish(own)
        if self._temperature != 1.0:
            own.div_(self._temperature)
        chunk = over_ranks(measure_blocks(logits, self._workspace, self.codec.proposal_exponent), self._group)
        if not bool(torch.isfinite(chunk.peak).all()):
            raise DataError("the teacher's logits are not finite: is the model damaged, or its precision too low?")
        return chunk

    def _groups_of_rows(self, rows: int) -> list[slice]:
        if rows and not self._head.weight.is_cuda:
            return list(row_blocks(rows, 1, CPU_ROWS_AT_ONCE))
        return [slice(0, rows)]

    def _entries(self, chunk: LogitBlocks, chunk_ids: np.ndarray, positions: np.ndarray) -> Entries:
        if self.codec.name == "sampled":
            return self._drawn(chunk, chunk_ids, positions)
        return self._largest(chunk)

    def _largest(self, chunk: LogitBlocks) -> Entries:
        count = min(self.codec.max_ids, self.codec.vocab_size)
        found, ids = largest_over_ranks(chunk.logits, chunk.maxima, self._head.vocab_start, count, self._group)
        probabilities = (found - chunk.row_max.unsqueeze(1)).double().exp_().mul_(chunk.peak.unsqueeze(1))
        tail = self._outside(chunk, ids)
        counts = torch.full_like(tail, count, dtype=torch.long)
        if self.codec.name == "top_p":
            counts = (probabilities.cumsum(-1) < self.codec.top_p).sum(-1).add_(1).clamp_max_(count)
        kept = torch.arange(count, device=tail.device) < counts.unsqueeze(1)
        tail += torch.where(kept, 0.0, probabilities).sum(-1)
        return Entries(
            counts=counts.cpu().numpy(),
            ids=ids[kept].cpu().numpy().astype(np.uint32),
            tail=tail.float().cpu().numpy(),
            probabilities=probabilities[kept].float().cpu().numpy(),
        )

    def _drawn(self, chunk: LogitBlocks, chunk_ids: np.ndarray, positions: np.ndarray) -> Entries:
        numbers = uniform_numbers(self.codec.seed, chunk_ids, positions, self.codec.max_ids)
        uniforms = torch.from_numpy(numbers).to(chunk.peak.device)
        first_id = self._head.vocab_start
        ids, total = draw(chunk.proposal_mass, chunk.proposal, uniforms, first_id, self._group)
        ids = ids.sort(-1).values
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        importance = None
        if self.codec.is_weighted:  # p / (p^e / total)
            probabilities = self._probabilities(chunk, ids)
            ratio = probabilities.pow(1.0 - self.codec.proposal_exponent) * total.unsqueeze(1)
            importance = ratio[first].float().cpu().numpy()
        tail = self._outside(chunk, ids)
        starts = np.flatnonzero(first.reshape(-1).cpu().numpy())
        return Entries(
            counts=first.sum(-1).cpu().numpy(),
            ids=ids[first].cpu().numpy().astype(np.uint32),
            tail=tail.float().cpu().numpy(),
            draws=np.diff(starts, append=first.numel()).astype(np.uint16),
            importance=importance,
        )

    def _probabilities(self, chunk: LogitBlocks, ids: Tensor) -> Tensor:
        """fp64 [n, N] probabilities of ids of any rank. Collective."""
        columns, owned = local_columns(ids, self._head.vocab_start, self._columns)
        relative = chunk.logits.flatten(1).gather(1, columns) - chunk.row_max.unsqueeze(1)
        return self._over_ranks(torch.where(owned, relative.double().exp_() * chunk.peak.unsqueeze(1), 0.0))

    def _outside(self, chunk: LogitBlocks, ids: Tensor) -> Tensor:
        """fp64 [n] probability of all ids but ``ids``, whose logits are overwritten. Collective.

        Summed, not 1 minus the others': a small tail keeps its digits. fp32 inside a block is exact enough.
        """
        columns, owned = local_columns(ids, self._head.vocab_start, self._columns)
        nothing_where_owned = torch.where(owned, NO_LOGIT, torch.inf).to(chunk.logits.dtype)
        chunk.logits.flatten(1).scatter_reduce_(-1, columns, nothing_where_owned, "amin")
        changed = columns // BLOCK
        mass = chunk.mass.scatter(-1, changed, chunk.probabilities(changed).sum(-1))
        return self._over_ranks(mass.sum(-1, dtype=torch.float64))

    def _over_ranks(self, values: Tensor) -> Tensor:
        return values if self._group is None else sum_over_group(values, self._group)


def _concatenate(parts: list[Entries]) -> Entries:
    if len(parts) == 1:
        return parts[0]
    columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    return Entries(**{name: None if part[0] is None else np.concatenate(part) for name, part in columns.items()})
