"""The distillation loss on held-out text: the student's divergence from its teacher, whatever the placement."""

from dataclasses import dataclass
from typing import Sequence

import numpy
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.losses.fused_linear import linear_distillation_loss
from megatron_kd.losses.types import DistillationObjective
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage, sum_over_group
from megatron_kd.parallel.schedule import forward_only
from megatron_kd.teachers.interface import Teacher
from megatron_kd.training.distillation_config import LossConfig
from megatron_kd.training.objective import sequence_major

MICRO_BATCHES_PER_SCHEDULE = 8


@dataclass(frozen=True)
class HeldoutDistillation:
    """Means over the unmasked held-out tokens, nats."""

    kd_loss: float
    teacher_entropy: float
    tail_mass: float


@torch.no_grad()
def heldout_distillation(
    chunks: Sequence[HiddenStateGPTModel],
    groups: ProcessGroupCollection,
    teacher: Teacher,
    objective: DistillationObjective,
    dataset: ChunkDataset,
    *,
    device: torch.device,
    micro_batch_size: int,
    execution: LossConfig,
) -> HeldoutDistillation:
    """Over every chunk of ``dataset``, equal on all ranks. Collective over the student's ranks.

    Micro-batches are dealt out to the data-parallel ranks; the last ones are filled up with masked rows, so that all
    ranks ask the teacher alike and an interleaved pipeline gets a multiple of its stages.
    """
    size = groups.dp.size() * micro_batch_size
    multiple = groups.pp.size() if len(chunks) > 1 else 1
    rounds = range(_round_up(-(-dataset.num_chunks // size), multiple))
    per_schedule = _round_up(MICRO_BATCHES_PER_SCHEDULE, multiple)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    was_training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    for start in rounds[::per_schedule]:
        batches = [
            _read(dataset, r * size + groups.dp.rank() * micro_batch_size, micro_batch_size).to(device)
            for r in rounds[start : start + per_schedule]
        ]
        teacher.begin_step(batches, scheduled=False)
        reports = forward_only(
            chunks,
            groups,
            lambda batch: (batch.tokens, batch.position_ids),
            lambda batch, hidden: _sums(chunks[-1], groups, teacher, objective, execution, batch, hidden),
            batches,
            seq_length=dataset.seq_length,
            micro_batch_size=micro_batch_size,
        )
        if is_last_stage(groups) and groups.tp.rank() == 0:
            sums += sum(reports)
    for chunk in chunks:
        chunk.train(was_training)
    kd, entropy, tail, tokens = sum_over_group(sums, groups.intra_dist_opt).tolist()
    count = max(1.0, tokens)
    return HeldoutDistillation(kd / count, entropy / count, tail / count)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _read(dataset: ChunkDataset, first: int, rows: int) -> Batch:
    """``rows`` chunks from ``first`` on; those beyond the last are masked."""
    indices = numpy.arange(first, first + rows)
    batch = make_batch(dataset, numpy.minimum(indices, dataset.num_chunks - 1), dataset.seq_length)
    beyond = torch.from_numpy(indices >= dataset.num_chunks)
    batch.loss_mask[beyond] = 0.0
    batch.chunk_indices[beyond] = -1
    return batch


def _sums(
    model: HiddenStateGPTModel,
    groups: ProcessGroupCollection,
    teacher: Teacher,
    objective: DistillationObjective,
    execution: LossConfig,
    batch: Batch,
    hidden: Tensor,
) -> Tensor:
    """fp64 [4]: divergence, teacher's entropy, tail mass and tokens of a micro-batch."""
    result = linear_distillation_loss(
        hidden,
        model.output_head(),
        sequence_major(batch.labels, groups.cp),
        sequence_major(batch.loss_mask, groups.cp),
        objective,
        teacher.knowledge(batch),
        tp_group=groups.tp,
        sequence_parallel=model.config.sequence_parallel,
        tile_bytes=execution.tile_bytes,
        backend=execution.backend,
    )
    values = [result.kd_sum, result.teacher_entropy_sum, result.tail_mass_sum, result.token_count]
    return torch.stack([torch.zeros_like(result.lm_sum).double() if v is None else v.double() for v in values])
