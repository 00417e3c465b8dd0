"""A teacher on the student's ranks and in the student's tensor and pipeline layout.

Without a pipeline each micro-batch's teacher pass runs just before its student pass. With one, a teacher pass inside
the student's schedule would wait for ranks that wait for it, so all passes of a step run first and the last stage
keeps their hidden states ([s, b, h_teacher] a micro-batch) until the loss takes them.
"""

from typing import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.losses import DenseKnowledge, OutputHead
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage
from megatron_kd.parallel.schedule import forward_only
from megatron_kd.teachers.control import Decision


class ColocatedTeacher:
    """Dense knowledge from a frozen model that shares the student's process groups.

    Args:
        chunks: the teacher's model chunks on this rank, weights loaded.
        groups: process groups of the teacher's layout, which is the student's.
    """

    def __init__(self, chunks: Sequence[HiddenStateGPTModel], groups: ProcessGroupCollection):
        for chunk in chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        self._chunks = list(chunks)
        self._groups = groups
        self._runs_first = groups.pp.size() > 1
        self._kept: dict[int, Tensor] = {}
        self._head: OutputHead | None = chunks[-1].output_head() if is_last_stage(groups) else None
        self.passes = 0

    def begin_step(self, batches: Sequence[Batch]) -> None:
        """Run the passes of a step ahead of a pipelined student; nothing otherwise."""
        self._kept.clear()
        if self._runs_first:
            for batch, hidden in zip(batches, self._forward(batches)):
                self._kept[id(batch)] = hidden

    def knowledge(self, batch: Batch) -> DenseKnowledge | None:
        """Hidden states [tokens, h_teacher] in sequence-major order, and the teacher's head; None before the last
        stage."""
        if self._head is None:
            return None
        hidden = self._kept.pop(id(batch)) if self._runs_first else self._forward([batch])[0]
        return DenseKnowledge(hidden=hidden.flatten(0, 1), head=self._head)

    def follow(self, decision: Decision) -> None:
        """Nothing: it runs where the loop runs."""

    @torch.no_grad()
    def _forward(self, batches: Sequence[Batch]) -> list[Tensor]:
        self.passes += len(batches)
        rows, seq_length = batches[0].tokens.shape
        return forward_only(
            self._chunks,
            self._groups,
            lambda batch: (batch.tokens, batch.position_ids),
            self._whole_sequence,
            batches,
            seq_length=seq_length,
            micro_batch_size=rows,
        )

    def _whole_sequence(self, _: Batch, hidden: Tensor) -> Tensor:
        if self._chunks[-1].config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=self._groups.tp)
        return hidden
