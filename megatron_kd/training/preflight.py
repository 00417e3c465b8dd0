"""Whether a run fits into its devices, by arithmetic, before anything is built: bytes of a rank in steady state.

Student: weights, gradients, optimizer state, activations in flight, loss chunks. Co-located teacher: weights, its
output layer again where its layout differs from the student's, activations of a pass, hidden states that wait.
Remote teacher, on the student's last stage: its output layer and the hand-offs being received.
"""

import dataclasses
import os

import psutil
import torch

from megatron_kd.errors import ConfigError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.planning.memory import ELEMENT_BYTES, RankMemory, padded_rows, rank_parameters, student_memory
from megatron_kd.training.config import TrainConfig

USABLE = 0.95  # of a device: the rest is the context and what the allocator cannot use


def check_memory(
    config: TrainConfig,
    architecture: ModelArchitecture,
    layout: ParallelLayout,
    teacher: ModelArchitecture | None,
    seq_length: int,
    device: torch.device,
) -> None:
    """Refuse a run that cannot fit.

    Args:
        layout: the student's.
        teacher: of a teacher that runs; None without one.

    Raises:
        ConfigError: a stage needs more than a device has; the message holds every part in MB.
    """
    limit = device_bytes(device) * USABLE
    for stage in range(layout.pipeline):
        need = rank_memory(config, architecture, layout, stage, teacher, seq_length, device.type)
        if need.total > limit:
            parts = ", ".join(
                f"{field.name.replace('_', ' ')} {getattr(need, field.name) / 1e6:,.0f}"
                for field in dataclasses.fields(need)
                if getattr(need, field.name)
            )
            raise ConfigError(
                f"a rank of pipeline stage {stage} needs {need.total / 1e6:,.0f} MB ({parts}), its device has "
                f"{limit / 1e6:,.0f}: use more tensor or pipeline parallelism, a smaller training.micro_batch_size, or "
                "another teacher.placement"
            )


def rank_memory(
    config: TrainConfig,
    architecture: ModelArchitecture,
    layout: ParallelLayout,
    stage: int,
    teacher: ModelArchitecture | None,
    seq_length: int,
    device: str,
) -> RankMemory:
    """Bytes on a rank of the student's pipeline ``stage``, by part."""
    settings = config.training
    micro_batches = layout.micro_batches(settings.global_batch_size, settings.micro_batch_size)
    dense = teacher is not None and config.teacher.payload == "hidden"
    student = student_memory(
        architecture,
        layout,
        stage,
        precision=settings.precision,
        micro_batch_size=settings.micro_batch_size,
        seq_length=seq_length,
        micro_batches=micro_batches,
        models_in_loss=2 if dense else 1,
        fused=device == "cuda",
        device=device,
    )
    if teacher is None:
        return student
    width, is_last = ELEMENT_BYTES[settings.precision], stage == layout.pipeline - 1
    item = settings.micro_batch_size * seq_length * teacher.hidden_size * width
    head = padded_rows(architecture.vocab_size, layout.tensor) // layout.tensor * teacher.hidden_size * width
    if config.teacher.placement == "remote":
        received = config.teacher.prefetch_depth * item if dense else 0
        return dataclasses.replace(
            student, teacher_weights=head * (is_last and dense), teacher_activations=received * is_last
        )
    own = ParallelLayout(
        tensor=config.teacher.tensor_model_parallel_size or layout.tensor,
        pipeline=config.teacher.pipeline_model_parallel_size or layout.pipeline,
        context=1,
        data=1,
    )
    same = (own.tensor, own.pipeline) == (layout.tensor, layout.pipeline)
    weights = max(rank_parameters(teacher, own, own_stage) for own_stage in range(own.pipeline)) * width
    waiting = min(config.teacher.stash_megabytes << 20, item * (micro_batches if layout.pipeline > 1 else 1))
    working = settings.micro_batch_size * seq_length * (2 * teacher.hidden_size + 3 * teacher.ffn_hidden_size) * width
    return dataclasses.replace(
        student,
        teacher_weights=weights + (0 if same else head * is_last),
        teacher_activations=working + waiting * is_last,
    )


def device_bytes(device: torch.device) -> float:
    """Memory of a rank's device; of a CPU, this rank's share of what its host has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return psutil.virtual_memory().available / ranks
