"""Checks before anything is built: whether a run fits into its devices, and which accelerated parts it uses.

Memory is a rank's bytes in steady state, by the arithmetic of ``plan_run`` (costs/memory.py). Of the optional
accelerated parts it says which are installed, which a run uses, and which no recorded GPU run has tried yet.
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
from megatron_kd.training.training_run import TrainingRun

_STUDENT_REMEDY = (
    "more tensor or pipeline parallelism, a smaller training.micro_batch_size, or another teacher.placement"
)
_TEACHER_REMEDY = (
    "a larger teacher.tensor_model_parallel_size or teacher.pipeline_model_parallel_size (and teacher.num_ranks), "
    "or a smaller training.micro_batch_size"
)
USABLE = 0.95  # of a device: the rest is the context and what the allocator cannot use


def check_memory(run: TrainingRun) -> None:
    """Refuse a run that cannot fit into the student's ranks.

    Raises:
        ConfigError: a stage needs more than a device has; the message holds every part in MB.
    """
    limit = device_bytes(run.device) * USABLE
    for rank in range(run.layout.world_size):
        stage = run.layout.coordinates(rank).pipeline
        need = rank_memory(run, rank, run.device.type)
        _refuse_if_above(limit, need, f"rank {rank} (pipeline stage {stage})", _STUDENT_REMEDY)


def check_teacher_ranks(run: TrainingRun, layout: ParallelLayout, teacher: ModelArchitecture) -> None:
    """Refuse a remote teacher that cannot fit into its ranks.

    Args:
        layout: the teacher's own, over its ranks.

    Raises:
        ConfigError: a stage needs more than a device has; the message holds every part in MB.
    """
    limit = device_bytes(run.device) * USABLE
    for rank in range(layout.world_size):
        stage = layout.coordinates(rank).pipeline
        need = teacher_rank_memory(run, layout, rank, teacher)
        _refuse_if_above(limit, need, f"teacher rank {rank} (pipeline stage {stage})", _TEACHER_REMEDY)


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


def rank_memory(run: TrainingRun, rank: int, device: str) -> RankMemory:
    """Return the bytes on one of the student's ranks, by part, on a ``device`` of this type."""
    config, layout, teacher = run.config, run.layout, run.teacher_architecture
    stage, batch = layout.coordinates(rank).pipeline, _batch_sizes(run)
    sizes = batch | {"micro_batches": run.micro_batches}
    dense = teacher is not None and not config.teacher.gives_sparse_knowledge
    student = student_memory(
        run.architecture, layout, stage, layers=layout.stage_layers(run.architecture.num_layers),
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
    placed = _remote(run, layout, teacher)
    return student + received_memory(run.architecture, layout, stage, placed, **batch)


def teacher_rank_memory(run: TrainingRun, layout: ParallelLayout, rank: int, teacher: ModelArchitecture) -> RankMemory:
    """Return the bytes on one of a remote teacher's ranks, whose layout is ``layout``."""
    return remote_rank_memory(_remote(run, layout, teacher), rank, **_batch_sizes(run))


def _batch_sizes(run: TrainingRun) -> dict[str, Any]:
    training = run.config.training
    return {
        "precision": training.precision,
        "micro_batch_size": training.micro_batch_size,
        "seq_length": run.seq_length,
    }


def _remote(run: TrainingRun, layout: ParallelLayout, teacher: ModelArchitecture) -> PlacedTeacher:
    keys = run.config.teacher
    return PlacedTeacher(
        teacher, layout, is_remote=True, payload_ids=keys.payload_ids, prefetch_depth=keys.prefetch_depth
    )


def device_bytes(device: torch.device) -> float:
    """Return the memory of a rank's device; on a CPU, this rank's share of what its host has available."""
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
    """Return Transformer Engine, a FusedAdam and Triton, as a run on ``device`` finds them.

    Args:
        loss_backend: ``distillation.loss.backend``.
    """
    picks_triton = device.type == "cuda" and loss_backend == "auto" and use_triton("auto", device)
    library = megatron_optimizer.Adam.__module__.split(".")[0]
    is_fused = library in ("transformer_engine", "apex")
    return [
        Part(LAYERS, _is_installed("transformer_engine"), spec == "te"),
        Part(f"{library if is_fused else 'apex'}'s FusedAdam", is_fused or _is_installed("apex"), is_fused),
        Part(TRITON, _is_installed("triton"), picks_triton or loss_backend == "triton"),
    ]


def chosen(spec: Literal["te", "local"], parts: list[Part]) -> str:
    """Say in a few words what computes layers, updates and losses."""
    _, adam, triton = parts
    return f"{spec} layers, {adam.name if adam.is_used else 'AdamW of torch'}, losses in {_losses(triton)}"


def notice(parts: list[Part], device: torch.device) -> str | None:
    """Return one line on which parts are in use or only installed, and which have no recorded run.

    None if all have one. On a CPU a part that is installed and not in use is no choice, and not named.
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
