"""Reduce a teacher's hidden states to the ids that a codec keeps, without ever holding all logits.

    hidden [T, h] -> tiles of C tokens: logits [C, R] -> statistics of blocks of ids -> the codec's ids -> numpy

R is this rank's part of the teacher's vocabulary. All logits of a tile are read once, for the statistics of their
blocks (``vocabulary_search.py``); the codec then looks for its ids in the few blocks that can hold them, some tokens at
a time. Collective over the tensor-parallel group, of which every rank gets the same entries.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_kd.errors import DataError
from megatron_kd.losses.tile_buffers import HeadLogits, Workspace
from megatron_kd.losses.tile_terms import row_blocks
from megatron_kd.losses.types import OutputHead
from megatron_kd.teachers.cache.codec import Codec, Entries
from megatron_kd.teachers.cache.vocabulary_search import BLOCK, NO_LOGIT, BlockedSoftmax, blocks_of

DEFAULT_TILE_BYTES = 640 << 20  # few tiles: each product reads all of the head's weight
CPU_TOKENS_AT_ONCE = 64  # tokens whose blocks are searched together; on CUDA all of a tile


class Sparsifier:
    """Keeps the ids of a codec from a teacher's distribution, softmax(logits / temperature).

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
        self._tile_tokens = max(1, tile_bytes // (4 * BLOCK * blocks_of(widest)))
        self._workspace = Workspace()  # fresh memory costs as much as a pass over it

    @torch.no_grad()
    def __call__(self, hidden: Tensor, chunk_ids: np.ndarray, positions: np.ndarray) -> Entries:
        """Return the entries of T tokens. Collective over the tensor-parallel group.

        Args:
            hidden: [T, h], the same on every rank.
            chunk_ids, positions: int64 [T], root chunk id and place in the chunk of each token; they decide its draws.

        Raises:
            DataError: a logit is not finite.
        """
        parts, count = [], max(1, -(-len(hidden) // self._tile_tokens))
        step = max(1, -(-len(hidden) // count))  # spread evenly
        for start in range(0, max(1, len(hidden)), step):
            tile = self._softmax(hidden[start : start + step])
            for rows in self._search_slices(len(tile.peak)):
                tokens = slice(start + rows.start, start + rows.stop)
                parts.append(self.codec.select(tile.rows(rows), chunk_ids[tokens], positions[tokens]))
        return Entries.concatenate(parts)

    def _softmax(self, hidden: Tensor) -> BlockedSoftmax:
        """Compute softmax(logits / T) of a tile [C, h], valid until the next call."""
        shape = (len(hidden), BLOCK * blocks_of(self._columns))
        logits = self._workspace.take("logits", shape, torch.float32, hidden.device)
        own = logits[:, : self._columns]
        self._logits.product(hidden.to(self._head.weight.dtype), own)
        logits[:, self._columns :] = NO_LOGIT
        self._logits.finish(own)
        if self._temperature != 1.0:
            own.div_(self._temperature)
        tile = BlockedSoftmax.measure(
            logits,
            self._workspace,
            self.codec.proposal_exponent,
            first_id=self._head.vocab_start,
            num_ids=self._columns,
            group=self._group,
        )
        if not bool(torch.isfinite(tile.peak).all()):
            raise DataError("the teacher's logits are not finite: is the model damaged, or its precision too low?")
        return tile

    def _search_slices(self, tokens: int) -> list[slice]:
        if tokens and not self._head.weight.is_cuda:
            return list(row_blocks(tokens, 1, CPU_TOKENS_AT_ONCE))
        return [slice(0, tokens)]
