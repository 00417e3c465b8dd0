"""What a remote teacher sends about a micro-batch: hidden states, or ids and weights. One tensor of a fixed shape.

    hidden            [s, b, h_teacher] in the teacher's dtype
    top_k, sampled    [s, b, 2 K + 1] int32: K ids, then K weights and the tail mass as the bits of fp32

Under context parallelism each of the student's ranks receives its own positions. A header of 3 int64 precedes it.

Sparse payloads hold what a cache of the same settings would, draws included: these depend on the identity of a chunk
and the place in it, so every layout and order gives the same ids.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.losses.types import PADDING_ID, DenseKnowledge, OutputHead, SparseKnowledge, SparseTargetKind
from megatron_kd.teachers.cache.codec import Codec, Entries, ranks
from megatron_kd.teachers.cache.sparsifier import Sparsifier
from megatron_kd.teachers.placements import StudentRun, TeacherPlan
from megatron_kd.teachers.teacher_config import TeacherConfig

HEADER_NUMBERS = 3


@dataclass(frozen=True)
class Header:
    """The identity of the micro-batch that a payload is about."""

    step: int
    micro_batch: int
    key: int

    def to_tensor(self, device: torch.device) -> Tensor:
        """Return it as int64 [3]."""
        return torch.tensor([self.step, self.micro_batch, self.key], dtype=torch.int64, device=device)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "Header":
        """Invert :meth:`to_tensor`."""
        return cls(*tensor.tolist())


class Receiver(Protocol):
    """The student's end of a payload."""

    def buffer(self, rows: int, seq_length: int, device: torch.device) -> Tensor:
        """Return an empty tensor to receive a micro-batch of [b, s] into."""

    def decode(self, received: Tensor) -> DenseKnowledge | SparseKnowledge:
        """Turn what was received into knowledge."""


class Sender(Protocol):
    """The teacher's end of a payload, on its last pipeline stage."""

    def encode(self, hidden: Tensor, chunk_ids: Tensor) -> Tensor:
        """Turn hidden states [s, b, h] into what is sent. Collective over the teacher's tensor-parallel group.

        Args:
            chunk_ids: int64 [b], the identity of each row's chunk, which decides what is drawn.
        """


def receiver_of(config: TeacherConfig, run: StudentRun, plan: TeacherPlan, head: OutputHead | None) -> Receiver:
    """Build the student's end of ``teacher.payload``.

    Args:
        head: the teacher's output layer for this rank's interval of ids, where the payload is hidden states.
    """
    if config.payload_ids is None:
        return HiddenStatesReceiver(plan.info.architecture.hidden_size, run.dtype, head)
    codec = Codec.build(config.payload, config, plan.info.architecture.vocab_size)
    return SparseReceiver(codec, codec.target_kind(run.sparse_target, f"teacher.payload {config.payload}"))


def sender_of(
    config: TeacherConfig, run: StudentRun, plan: TeacherPlan, head: OutputHead, groups: ProcessGroupCollection
) -> Sender:
    """Build the teacher's end of ``teacher.payload``.

    Args:
        head: this rank's part of the teacher's output layer.
        groups: the teacher's.
    """
    if config.payload_ids is None:
        return HiddenStatesSender()
    codec = Codec.build(config.payload, config, plan.info.architecture.vocab_size)
    return SparseSender(Sparsifier(codec, head, groups.tp, run.temperature))


class HiddenStatesReceiver:
    """The payload ``hidden`` on the student's side, whose last stage computes the teacher's output layer."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, head: OutputHead | None):
        self._hidden_size, self._dtype, self._head = hidden_size, dtype, head

    def buffer(self, rows: int, seq_length: int, device: torch.device) -> Tensor:
        """Return [s, b, h_teacher]."""
        return torch.empty(seq_length, rows, self._hidden_size, dtype=self._dtype, device=device)

    def decode(self, received: Tensor) -> DenseKnowledge:
        """Implement :class:`Receiver`."""
        assert self._head is not None, "only the last stage, which has the head, receives"
        return DenseKnowledge(hidden=received.flatten(0, 1), head=self._head)


class HiddenStatesSender:
    """The payload ``hidden`` on the teacher's side."""

    def encode(self, hidden: Tensor, chunk_ids: Tensor) -> Tensor:
        """Implement :class:`Sender`."""
        return hidden.contiguous()


class SparseReceiver:
    """A codec's ids and weights on the student's side."""

    def __init__(self, codec: Codec, kind: SparseTargetKind):
        self._format, self._vocab_size, self._kind = _SparseFormat(codec), codec.vocab_size, kind

    def buffer(self, rows: int, seq_length: int, device: torch.device) -> Tensor:
        """Return [s, b, 2 K + 1] int32."""
        return torch.empty(seq_length, rows, self._format.columns, dtype=torch.int32, device=device)

    def decode(self, received: Tensor) -> SparseKnowledge:
        """Implement :class:`Receiver`."""
        received = received.flatten(0, 1)
        weights = received[:, self._format.width :].contiguous().view(torch.float32)
        return SparseKnowledge(
            ids=received[:, : self._format.width].long(),
            weights=weights[:, :-1].contiguous(),
            tail_mass=weights[:, -1].contiguous(),
            kind=self._kind,
            vocab_size=self._vocab_size,
        )


class SparseSender:
    """A codec's ids and weights on the teacher's side."""

    def __init__(self, sparsifier: Sparsifier):
        self._sparsifier, self._format = sparsifier, _SparseFormat(sparsifier.codec)

    def encode(self, hidden: Tensor, chunk_ids: Tensor) -> Tensor:
        """Implement :class:`Sender`."""
        seq_length, rows = hidden.shape[:2]
        owners, places = np.tile(chunk_ids.numpy(), seq_length), np.repeat(np.arange(seq_length), rows)
        entries = self._sparsifier(hidden.flatten(0, 1), owners, places)
        packed = torch.from_numpy(self._format.pack(entries))
        return packed.view(seq_length, rows, -1).to(hidden.device)


class _SparseFormat:
    """Entries as one int32 row per token."""

    def __init__(self, codec: Codec):
        self._codec = codec
        self.width = min(codec.max_ids, codec.vocab_size)
        self.columns = 2 * self.width + 1

    def pack(self, entries: Entries) -> np.ndarray:
        """Return [T, 2 K + 1]."""
        tokens = len(entries.counts)
        packed = np.zeros((tokens, self.columns), dtype=np.int32)
        ids, weights = packed[:, : self.width], packed[:, self.width : -1]
        ids[:] = PADDING_ID
        owners, columns = np.repeat(np.arange(tokens), entries.counts), ranks(entries.counts)
        ids[owners, columns] = entries.ids.astype(np.int32)
        weights[owners, columns] = self._codec.weights(entries).view(np.int32)
        packed[:, -1] = entries.tail.astype(np.float32).view(np.int32)
        return packed
