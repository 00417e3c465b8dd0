"""What a remote teacher sends for a micro-batch: hidden states, or ids and weights. One tensor each, of a fixed shape.

    hidden            [s, b, h_teacher] in the teacher's dtype
    top_k, sampled    [s, b, 2 K + 1] int32: K ids, K weights and the tail mass as fp32 (sparse_payload.py)

Under context parallelism each of the student's ranks is sent its own positions of them.

Before it goes a header: (step, micro-batch, hash of the token ids), int64.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_kd.losses import DenseKnowledge, OutputHead, SparseKnowledge

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
