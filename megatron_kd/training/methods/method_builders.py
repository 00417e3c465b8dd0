"""From a configuration to a method's batch source and loss."""

import dataclasses
from typing import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.generation.decoder import Decoder
from megatron_kd.generation.generate import MixedPolicy, ModelPolicy
from megatron_kd.losses.types import LM_ONLY
from megatron_kd.teachers.interface import Teacher
from megatron_kd.training.distillation_config import METHODS_WITH_TEXT
from megatron_kd.training.methods.distillm import DistiLLMSource
from megatron_kd.training.methods.generated_text import PolicyMaker, TextWriter
from megatron_kd.training.methods.gkd import GKDSource
from megatron_kd.training.methods.minillm import MiniLLMLoss, MiniLLMSource, main_count
from megatron_kd.training.methods.pretraining import PretrainingBeside, PretrainingLoss
from megatron_kd.training.methods.source import BatchSource, DatasetSource
from megatron_kd.training.objective import (
    BatchLoss,
    DistillationLoss,
    FusedLoss,
    MicroBatchLoss,
    build_objective,
    token_weights,
)
from megatron_kd.training.setup import unwrap
from megatron_kd.training.train_config import TrainConfig


def build_loss(config: TrainConfig, teacher: Teacher | None, groups: ProcessGroupCollection) -> MicroBatchLoss:
    """Build the loss of a micro-batch under ``distillation.method``."""
    settings, reduction = config.distillation, config.training.loss_reduction
    objective, fused = build_objective(settings), FusedLoss(groups, settings.loss)
    losses: dict[str, BatchLoss] = {}
    if settings.method == "minillm":
        losses["main"] = MiniLLMLoss(settings.minillm, fused)
    else:
        sparse = config.teacher.gives_sparse_knowledge
        losses["main"] = DistillationLoss(objective, fused, reduction, reports_tail_mass=sparse)
    if settings.pretraining_weight > 0:
        pretraining = objective if settings.method == "minillm" else LM_ONLY
        losses["pretraining"] = PretrainingLoss(pretraining, fused, reduction)
    return MicroBatchLoss(losses, teacher, unwrap)


def build_lm_term(config: TrainConfig, groups: ProcessGroupCollection) -> MicroBatchLoss | None:
    """The LM term of the loss with its weight, without a teacher; None unless ``metrics`` asks for gradient ratios."""
    if config.metrics.kd_lm_gradient_ratio_interval is None:
        return None
    objective = dataclasses.replace(build_objective(config.distillation), kd_weight=0.0)
    fused = FusedLoss(groups, config.distillation.loss)
    return MicroBatchLoss({"main": DistillationLoss(objective, fused, config.training.loss_reduction)}, None, unwrap)


def build_source(
    config: TrainConfig,
    data: ChunkDataset,
    groups: ProcessGroupCollection,
    model: Sequence[torch.nn.Module],
    teacher: Teacher | None,
    device: torch.device,
) -> BatchSource:
    """Where the batches of ``distillation.method`` come from.

    Raises:
        LayoutError: the method decodes with a teacher that is laid out otherwise than the student.
    """
    settings = config.distillation
    if settings.method not in METHODS_WITH_TEXT:
        return DatasetSource()
    writer = TextWriter(
        settings.rollout,
        data,
        groups,
        seq_length=config.data.seq_length or data.seq_length,
        seed=config.training.seed,
        device=device,
    )
    source = _text_source(config, writer, data.vocab_size, groups, [unwrap(chunk) for chunk in model], teacher)
    if settings.pretraining_weight == 0:
        return source
    reduction = config.training.loss_reduction

    def auxiliary_count(batch):
        return token_weights(batch, reduction)[1]

    def count(batch):
        return main_count(batch, settings.minillm) if settings.method == "minillm" else auxiliary_count(batch)

    return PretrainingBeside(source, settings.pretraining_weight, groups, count, auxiliary_count)


def _text_source(
    config: TrainConfig,
    writer: TextWriter,
    ids: int,
    groups: ProcessGroupCollection,
    chunks: Sequence[torch.nn.Module],
    teacher: Teacher | None,
) -> BatchSource:
    """The batches of generated text; ``ids`` is how many of the vocabulary may be drawn."""
    settings, size, seed = config.distillation, config.training.global_batch_size, config.training.seed

    def student(rows: int, length: int) -> Decoder:
        return Decoder(chunks, groups, rows, length, vocab_size=ids)

    def speaks(rows: int, length: int) -> ModelPolicy:
        return ModelPolicy(student(rows, length))

    if settings.method == "gkd":
        teacher_speaks = _teacher_policy(teacher, groups, ids) if settings.gkd.seq_kd else None
        return GKDSource(settings.gkd, writer, speaks, teacher_speaks, seed=seed, global_batch_size=size)
    if settings.method == "distillm":
        return DistiLLMSource(settings.distillm, writer, speaks, groups, seed=seed, global_batch_size=size)
    policy = _rollout_policy(settings.minillm.teacher_mix, student, teacher, groups, ids)
    return MiniLLMSource(
        settings.minillm, writer, policy, teacher, groups, global_batch_size=size, execution=settings.loss
    )


def _teacher_decoder(
    teacher: Teacher | None, groups: ProcessGroupCollection, rows: int, length: int, ids: int
) -> Decoder:
    assert teacher is not None
    return teacher.decoder(groups, rows, length, ids)


def _teacher_policy(teacher: Teacher | None, groups: ProcessGroupCollection, ids: int) -> PolicyMaker:
    _teacher_decoder(teacher, groups, 1, 1, ids)
    return lambda rows, length: ModelPolicy(_teacher_decoder(teacher, groups, rows, length, ids))


def _rollout_policy(
    mix: float, student, teacher: Teacher | None, groups: ProcessGroupCollection, ids: int
) -> PolicyMaker:
    if mix == 0:
        return lambda rows, length: ModelPolicy(student(rows, length), record=True)
    _teacher_decoder(teacher, groups, 1, 1, ids)
    return lambda rows, length: MixedPolicy(
        student(rows, length), _teacher_decoder(teacher, groups, rows, length, ids), mix
    )
