"""Whether a run fits into its devices, by arithmetic, before anything is built: bytes of a rank in steady state.

The numbers are ``plan_run``'s (costs/memory.py).

Optional accelerated parts: which are installed, which a run uses, which no recorded GPU run has tried yet.
"""

import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from megatron.core import optimizer as megatron_optimizer

from megatron_kd.costs.memory import (
    PlacedTeacher,
    RankMemory,
    received_memory,
    remote_rank_memory,
    student_memory,
    teacher_memory,
)
from megatron_kd.errors import ConfigError
from megatron_kd.losses.triton_path import use_triton
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.training.train_config import TrainConfig

_OF_THE_STUDENT = (
    "more tensor or pipeline parallelism, a smaller training.micro_batch_size, or another teacher.placement"
)
_OF_THE_TEACHER = (
    "a larger teacher.tensor_model_parallel_size or teacher.pipeline_model_parallel_size (and teacher.num_ranks), "
    "or a smaller training.micro_batch_size"
)
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
    for rank in range(layout.world_size):
        stage = layout.coordinates(rank).pipeline
        need = rank_memory(config, architecture, layout, rank, teacher, seq_length, device.type)
        _refuse_if_above(limit, need, f"rank {rank} (pipeline stage {stage})", _OF_THE_STUDENT)


def check_teacher_ranks(
    config: TrainConfig,
    layout: ParallelLayout,
    teacher: ModelArchitecture,
    seq_length: int,
    device: torch.device,
) -> None:
    """Refuse a remote teacher that cannot fit into its ranks.

    Args:
        layout: the teacher's own, over its ranks.

    Raises:
        ConfigError: as :func:`check_memory`.
    """
    limit = device_bytes(device) * USABLE
    for rank in range(layout.world_size):
        stage = layout.coordinates(rank).pipeline
        need = teacher_rank_memory(config, layout, rank, teacher, seq_length)
        _refuse_if_above(limit, need, f"teacher rank {rank} (pipeline stage {stage})", _OF_THE_TEACHER)


def _refuse_if_above(limit: float, need: RankMemory, who: str, remedy: str) -> None:
    if need.total <= limit:
        return
    parts = ", ".join(
        f"{field.name.replace('_', ' ')} {getattr(need, field.name) / 1e6:,.0f}"
        for field in dataclasses.fields(need)
        if getattr(need, field.name)
    )
    raise ConfigError(
        f"{who} needs {need.total / 1e6:,.0f} MB ({parts}), its device has {limit / 1e6:,.0f}: use {remedy}"
    )


def rank_memory(
    config: TrainConfig,
    architecture: ModelArchitecture,
    layout: ParallelLayout,
    rank: int,
    teacher: ModelArchitecture | None,
    seq_length: int,
    device: str,
) -> RankMemory:
    """Bytes on one of the student's ranks, by part."""
    settings, stage = config.training, layout.coordinates(rank).pipeline
    of_a_batch = _sizes(config, seq_length)
    sizes = of_a_batch | {"micro_batches": layout.micro_batches(settings.global_batch_size, settings.micro_batch_size)}
    dense = teacher is not None and not config.teacher.gives_sparse_knowledge
    student = student_memory(
        architecture, layout, stage, layers=layout.stage_layers(architecture.num_layers),
        models_in_loss=2 if dense else 1, fused=device == "cuda", device=device,
        loss_tile_budget=config.distillation.loss.tile_bytes, **sizes
    )  # fmt: skip
    if teacher is None:
        return student
    if not config.teacher.own_ranks:
        tensor = config.teacher.tensor_model_parallel_size or layout.tensor
        pipeline = config.teacher.pipeline_model_parallel_size or layout.pipeline
        own = ParallelLayout(tensor, pipeline, 1, max(1, layout.world_size // (tensor * pipeline)))
        stash = config.teacher.stash_megabytes << 20
        return student + teacher_memory(teacher, layout, own, rank, stash_bytes=stash, **sizes)
    placed = _remote(config, layout, teacher)
    return student + received_memory(architecture, layout, stage, placed, **of_a_batch)


def teacher_rank_memory(
    config: TrainConfig, layout: ParallelLayout, rank: int, teacher: ModelArchitecture, seq_length: int
) -> RankMemory:
    """Bytes on one of a remote teacher's ranks, whose layout is ``layout``."""
    return remote_rank_memory(_remote(config, layout, teacher), rank, **_sizes(config, seq_length))


def _sizes(config: TrainConfig, seq_length: int) -> dict[str, Any]:
    settings = config.training
    return {
        "precision": settings.precision,
        "micro_batch_size": settings.micro_batch_size,
        "seq_length": seq_length,
    }


def _remote(config: TrainConfig, layout: ParallelLayout, teacher: ModelArchitecture) -> PlacedTeacher:
    return PlacedTeacher(
        teacher, layout, is_remote=True, payload_ids=config.teacher.payload_ids,
        prefetch_depth=config.teacher.prefetch_depth,
    )  # fmt: skip


def device_bytes(device: torch.device) -> float:
    """Memory of a rank's device; of a CPU, this rank's share of what its host has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return psutil.virtual_memory().available / ranks


RECORDED: frozenset[str] = frozenset()
"""Parts with a recorded GPU run in ``benchmarks/results``; add a name together with its file."""
LAYERS, TRITON = "Transformer Engine's layers", "the losses' Triton kernels"


@dataclass(frozen=True)
class Part:
    """An optional part: whether its library is installed, and whether this run uses it."""

    name: str
    is_installed: bool
    is_used: bool


def optional_parts(spec: Literal["te", "local"], device: torch.device, loss_backend: str = "auto") -> list[Part]:
    """Transformer Engine, a FusedAdam, Triton, as a run on ``device`` with ``distillation.loss.backend`` finds them."""
    picks_triton = device.type == "cuda" and loss_backend == "auto" and use_triton("auto", device)
    library = megatron_optimizer.Adam.__module__.split(".")[0]
    is_fused = library in ("transformer_engine", "apex")
    return [
        Part(LAYERS, _is_installed("transformer_engine"), spec == "te"),
        Part(f"{library if is_fused else 'apex'}'s FusedAdam", is_fused or _is_installed("apex"), is_fused),
        Part(TRITON, _is_installed("triton"), picks_triton or loss_backend == "triton"),
    ]


def chosen(spec: Literal["te", "local"], parts: list[Part]) -> str:
    """What computes layers, updates and losses, in a few words."""
    _, adam, triton = parts
    return f"{spec} layers, {adam.name if adam.is_used else 'AdamW of torch'}, losses in {_losses(triton)}"


def notice(parts: list[Part], device: torch.device) -> str | None:
    """One line: which of them are in use or only installed, and which have no recorded run; None if it says nothing.

    On a CPU a part that is installed and not in use is no choice, and not named.
    """
    named = [part for part in parts if part.is_used or (part.is_installed and device.type == "cuda")]
    untried = [part.name for part in named if part.name not in RECORDED]
    if not untried:
        return None
    states = ", ".join(f"{part.name} {'in use' if part.is_used else 'installed but not in use'}" for part in named)
    advice = ": compare with a run without them" if any(part.is_used for part in named) else ""
    advice += " (model.layer_spec=local)" if advice and parts[0].is_used else ""
    return f"accelerated parts: {states}; without a recorded GPU run of this project: {', '.join(untried)}{advice}"


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _losses(triton: Part) -> str:
    return "Triton" if triton.is_used else "PyTorch"
