"""Evaluation on held-out text during training: the loss, and the student's divergence from its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.losses.types import DistillationObjective
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage, sum_over_group
from megatron_kd.parallel.schedule import forward_only
from megatron_kd.scoring.chunk_losses import HeldoutLoss, heldout_loss
from megatron_kd.teachers.interface import Teacher
from megatron_kd.teachers.placements import build_heldout_teacher
from megatron_kd.training.objective import FusedLoss, build_objective, sequence_major, unwrap
from megatron_kd.training.training_run import TrainingRun

MICRO_BATCHES_PER_SCHEDULE = 8


class HeldoutEvaluation:
    """Evaluates the student on ``data.eval_path``.

    Args:
        heldout: the dataset of that path.
        model: the student's DDP-wrapped model chunks on this rank.
        groups: the student's.
        teacher: the training teacher.
    """

    def __init__(
        self,
        run: TrainingRun,
        heldout: ChunkDataset,
        model: Sequence[DistributedDataParallel],
        groups: ProcessGroupCollection,
        teacher: Teacher | None,
    ) -> None:
        self._run, self._heldout, self._groups = run, heldout, groups
        self._model_chunks = [unwrap(model_chunk) for model_chunk in model]
        self._teacher = build_heldout_teacher(run.config.teacher, run.as_student(), groups, teacher, heldout)

    def loss(self) -> HeldoutLoss:
        """Return the totals over the dataset, equal on all ranks. Collective over the student's ranks."""
        return heldout_loss(
            self._model_chunks,
            self._groups,
            self._heldout,
            device=self._run.device,
            micro_batch_size=self._run.config.training.micro_batch_size,
            tile_bytes=self._run.config.distillation.loss.tile_bytes,
        )

    def distillation(self) -> dict[str, Any]:
        """Return the log's values about the divergence from the teacher; none where it is not evaluated.

        Collective over the student's ranks.
        """
        if self._teacher is None:
            return {}
        found = heldout_distillation(
            self._model_chunks,
            FusedLoss(self._groups, self._run.config.distillation.loss),  # its buffers go when it is done
            self._teacher,
            build_objective(self._run.config.distillation),
            self._heldout,
            device=self._run.device,
            micro_batch_size=self._run.config.training.micro_batch_size,
        )
        return {
            "eval_kd_loss": found.kd_loss,
            "eval_teacher_entropy": found.teacher_entropy,
            "eval_tail_mass": found.tail_mass,
        }


@dataclass(frozen=True)
class HeldoutDistillation:
    """Means over the unmasked held-out tokens, nats."""

    kd_loss: float
    teacher_entropy: float
    tail_mass: float


@torch.no_grad()
def heldout_distillation(
    model_chunks: Sequence[HiddenStateGPTModel],
    fused: FusedLoss,
    teacher: Teacher,
    objective: DistillationObjective,
    dataset: ChunkDataset,
    *,
    device: torch.device,
    micro_batch_size: int,
) -> HeldoutDistillation:
    """Evaluate the divergence on every chunk of ``dataset``, equal on all ranks. Collective over the student's ranks.

    Micro-batches are dealt out to the data-parallel ranks; the last ones are filled up with masked rows, so that all
    ranks ask the teacher alike and an interleaved pipeline gets a multiple of its stages.
    """
    groups = fused.groups
    size = groups.dp.size() * micro_batch_size
    multiple = groups.pp.size() if len(model_chunks) > 1 else 1
    rounds = range(_round_up(-(-dataset.num_chunks // size), multiple))
    per_schedule = _round_up(MICRO_BATCHES_PER_SCHEDULE, multiple)
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    was_training = model_chunks[0].training
    for model_chunk in model_chunks:
        model_chunk.eval()
    for start in rounds[::per_schedule]:
        batches = [
            _read(dataset, r * size + groups.dp.rank() * micro_batch_size, micro_batch_size).to(device)
            for r in rounds[start : start + per_schedule]
        ]
        teacher.begin_step(batches, scheduled=False)
        reports = forward_only(
            model_chunks,
            groups,
            lambda batch: (batch.tokens, batch.position_ids),
            lambda batch, hidden: _sums(model_chunks[-1], fused, teacher, objective, batch, hidden),
            batches,
            seq_length=dataset.seq_length,
            micro_batch_size=micro_batch_size,
        )
        if is_last_stage(groups) and groups.tp.rank() == 0:
            sums += sum(reports)
    for model_chunk in model_chunks:
        model_chunk.train(was_training)
    kd, entropy, tail, tokens = sum_over_group(sums, groups.intra_dist_opt).tolist()
    count = max(1.0, tokens)
    return HeldoutDistillation(kd / count, entropy / count, tail / count)


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _read(dataset: ChunkDataset, first: int, rows: int) -> Batch:
    """Read ``rows`` chunks from ``first`` on; rows beyond the last chunk are masked."""
    indices = numpy.arange(first, first + rows)
    batch = make_batch(dataset, numpy.minimum(indices, dataset.num_chunks - 1), dataset.seq_length)
    beyond = torch.from_numpy(indices >= dataset.num_chunks)
    batch.loss_mask[beyond] = 0.0
    batch.chunk_indices[beyond] = -1
    return batch


def _sums(
    model: HiddenStateGPTModel,
    fused: FusedLoss,
    teacher: Teacher,
    objective: DistillationObjective,
    batch: Batch,
    hidden: Tensor,
) -> Tensor:
    """Return fp64 [4]: divergence, teacher's entropy, tail mass and tokens of a micro-batch."""
    weights = sequence_major(batch.loss_mask, fused.groups.cp)
    result = fused(batch, model, hidden, weights, objective, teacher.knowledge(batch))
    values = [result.kd_sum, result.teacher_entropy_sum, result.tail_mass_sum, result.token_count]
    return torch.stack([torch.zeros_like(result.lm_sum).double() if v is None else v.double() for v in values])
