"""What a remote teacher sends for a micro-batch: hidden states, or ids and weights. One tensor each, of a fixed shape.

    hidden            [s, b, h_teacher] in the teacher's dtype
    top_k, sampled    [s, b, 2 K + 1] int32: K ids, K weights and the tail mass as fp32 (sparse_payload.py)

Under context parallelism each of the student's ranks is sent its own positions of them.

Before it goes a header: (step, micro-batch, hash of the token ids), int64.

The payloads ``top_k`` and ``sampled``: the teacher's ranks compute their output layer, ids and weights travel.

What is chosen is what ``cache_teacher_logits`` would choose for the same chunks, draws included: they depend on the
identity of a chunk and the place in it, so any layout and order give the same knowledge.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_kd.losses import PADDING_ID, DenseKnowledge, OutputHead, SparseKnowledge, SparseTargetKind
from megatron_kd.teachers.cache.codec import Codec, Entries, ranks
from megatron_kd.teachers.cache.kept_ids import Selection

HEADER_NUMBERS = 3


@dataclass(frozen=True)
class Header:
    """Whose knowledge follows."""

    step: int
    micro_batch: int
    token_hash: int

    def tensor(self, device: torch.device) -> Tensor:
        """As it travels."""
        return torch.tensor([self.step, self.micro_batch, self.token_hash], dtype=torch.int64, device=device)

    @classmethod
    def of(cls, tensor: Tensor) -> "Header":
        """Read back."""
        return cls(*tensor.tolist())


class HiddenStates:
    """The payload ``hidden``: the student's last stage computes the teacher's output layer."""

    def __init__(self, hidden_size: int, dtype: torch.dtype):
        self._hidden_size, self._dtype = hidden_size, dtype

    def buffer(self, rows: int, seq_length: int, device: torch.device) -> Tensor:
        """Where it is received."""
        return torch.empty(seq_length, rows, self._hidden_size, dtype=self._dtype, device=device)

    def encode(self, hidden: Tensor, _: Tensor) -> Tensor:
        """What is sent of hidden states [s, b, h]."""
        return hidden.contiguous()

    def decode(self, received: Tensor, head: OutputHead | None) -> DenseKnowledge:
        """The knowledge; ``head`` is the teacher's, for this rank's interval of ids."""
        return DenseKnowledge(hidden=received.flatten(0, 1), head=head)


class Payload(Protocol):
    """One of the payloads, on both ends."""

    def buffer(self, rows: int, seq_length: int, device: torch.device) -> Tensor:
        """Where it is received."""

    def encode(self, hidden: Tensor, chunks: Tensor) -> Tensor:
        """What is sent of hidden states [s, b, h]. Collective over the teacher's tensor-parallel group.

        Args:
            chunks: int64 [b], the identity of the rows' chunks, which decides what is drawn.
        """

    def decode(self, received: Tensor, head: OutputHead | None) -> DenseKnowledge | SparseKnowledge:
        """The knowledge; ``head`` is the teacher's, for this rank's interval of ids, where it is needed."""


class SparseEntries:
    """One of the two, on either end.

    Args:
        codec: what is chosen.
        kind: the loss that the student makes of it.
        selection: on the teacher's last stage: chooses; None elsewhere.
    """

    def __init__(self, codec: Codec, kind: SparseTargetKind, selection: Selection | None = None):
        self._codec, self._kind, self._selection = codec, kind, selection
        self._width = min(codec.max_ids, codec.vocab_size)

    def buffer(self, rows: int, seq_length: int, device: torch.device) -> Tensor:
        """[s, b, 2 K + 1] int32."""
        return torch.empty(seq_length, rows, 2 * self._width + 1, dtype=torch.int32, device=device)

    def encode(self, hidden: Tensor, chunks: Tensor) -> Tensor:
        """See :class:`~megatron_kd.teachers.remote.payloads.Payload`."""
        seq_length, rows = hidden.shape[:2]
        owners, places = np.tile(chunks.numpy(), seq_length), np.repeat(np.arange(seq_length), rows)
        entries = self._selection(hidden.flatten(0, 1), owners, places)
        return torch.from_numpy(self._packed(entries, len(owners))).view(seq_length, rows, -1).to(hidden.device)

    def _packed(self, entries: Entries, tokens: int) -> np.ndarray:
        packed = np.zeros((tokens, 2 * self._width + 1), dtype=np.int32)
        ids, weights = packed[:, : self._width], packed[:, self._width : -1]
        ids[:] = PADDING_ID
        owners, columns = np.repeat(np.arange(tokens), entries.counts), ranks(entries.counts)
        ids[owners, columns] = entries.ids.astype(np.int32)
        values = entries.probabilities if entries.draws is None else entries.draws / np.float32(self._codec.max_ids)
        weights[owners, columns] = values.astype(np.float32).view(np.int32)
        packed[:, -1] = entries.tail.astype(np.float32).view(np.int32)
        return packed

    def decode(self, received: Tensor, head: OutputHead | None) -> SparseKnowledge:
        """See :class:`~megatron_kd.teachers.remote.payloads.Payload`; no head is needed."""
        received = received.flatten(0, 1)
        weights = received[:, self._width :].contiguous().view(torch.float32)
        return SparseKnowledge(
            ids=received[:, : self._width].long(),
            weights=weights[:, :-1].contiguous(),
            tail_mass=weights[:, -1].contiguous(),
            kind=self._kind,
            vocab_size=self._codec.vocab_size,
        )
