"""Build the teacher that the ``teacher.*`` keys ask for.

``teacher_config.PLACEMENTS`` names the module of each placement; it is imported when it is asked for. A placement's
module defines

    build(config, run, groups)                         the student's end, on every rank of the student
    build_teacher_ranks(config, run, plan, batches)    the teacher's end, where it has ranks of its own

and uses what placements that run a model have in common: :func:`plan_teacher` and :func:`load_teacher`.
"""

import dataclasses
import importlib
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.checkpoints.weights import CheckpointInfo, check_same_tokenizer, load_weights, open_checkpoint
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import LayoutError
from megatron_kd.models.architecture import LayerSpecName, ModelArchitecture, Precision
from megatron_kd.models.gpt import HiddenStateGPTModel, build_model, padded_vocab_size
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.parallel.runtime import SplitWorld
from megatron_kd.teachers.interface import ScheduledBatches, Teacher, TeacherRanks
from megatron_kd.teachers.teacher_config import TeacherConfig


@dataclass(frozen=True)
class StudentRun:
    """The run that a teacher serves, as far as a teacher depends on it.

    Attributes:
        data: the training chunks.
        architecture: the student's; its vocabulary decides which rows of the teacher's output layer go where.
        layout: the student's.
        temperature: ``distillation.temperature``.
        sparse_target: ``distillation.sparse_target``.
        train_iters: optimizer steps of the whole run.
        split: the student's and the teacher's ranks, where the teacher has ranks of its own.
    """

    data: ChunkDataset
    architecture: ModelArchitecture
    layout: ParallelLayout
    seq_length: int
    precision: Precision
    layer_spec: LayerSpecName
    temperature: float
    sparse_target: str
    train_iters: int
    device: torch.device
    split: SplitWorld | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of both models' hidden states."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def head_rows(self) -> int:
        """Rows of the student's output weight on a tensor-parallel rank."""
        return padded_vocab_size(self.architecture.vocab_size, self.layout.tensor) // self.layout.tensor


@dataclass(frozen=True)
class TeacherPlan:
    """A teacher that runs: its checkpoint, and its own layout over its ranks."""

    info: CheckpointInfo
    layout: ParallelLayout

    @property
    def head_rows(self) -> int:
        """Rows of the teacher's output weight on a tensor-parallel rank."""
        return padded_vocab_size(self.info.architecture.vocab_size, self.layout.tensor) // self.layout.tensor


def build_teacher(config: TeacherConfig, run: StudentRun, groups: ProcessGroupCollection) -> Teacher | None:
    """Build the student's end of the teacher; None without one. Collective over the student's ranks.

    Args:
        groups: the student's.

    Raises:
        CheckpointError: the teacher's checkpoint is missing, damaged, or reads other ids than the dataset holds.
        LayoutError: the teacher's layout does not divide its ranks or its model.
        DataError: the cache does not fit the dataset or the run.
        ConfigError: the placement does not give the sparse target that is asked for.
    """
    module = config.where.module
    return None if module is None else importlib.import_module(module).build(config, run, groups)


def build_teacher_ranks(
    config: TeacherConfig, run: StudentRun, plan: TeacherPlan, batches: ScheduledBatches
) -> TeacherRanks:
    """Build the teacher's end, with its weights, on the ranks that are its own. Collective over them.

    Args:
        plan: what :func:`plan_teacher` gave.
        batches: the batches that the student reads.
    """
    module = config.where.ranks_module
    if module is None:
        raise ValueError(f"teacher.placement {config.placement} has no ranks of its own")
    return importlib.import_module(module).build_teacher_ranks(config, run, plan, batches)


def build_heldout_teacher(
    config: TeacherConfig,
    run: StudentRun,
    groups: ProcessGroupCollection,
    teacher: Teacher | None,
    heldout: ChunkDataset | None,
) -> Teacher | None:
    """Return what the held-out distillation loss asks: ``teacher`` itself, or a second one that covers ``heldout``.

    None where that loss is not evaluated.
    """
    if heldout is None or teacher is None or not config.evaluate:
        return None
    if config.where.knows_any_text:
        return teacher
    if config.eval_cache_path is None:
        return None
    config = dataclasses.replace(config, cache_path=config.eval_cache_path)
    return build_teacher(config, dataclasses.replace(run, data=heldout), groups)


def plan_teacher(config: TeacherConfig, run: StudentRun) -> TeacherPlan:
    """Open the teacher's checkpoint and lay it out over its ranks, filled up with data parallelism.

    Raises:
        CheckpointError: it is missing, damaged, or reads other ids than the dataset holds.
        LayoutError: the layout does not divide the ranks or the model.
    """
    info = open_checkpoint(str(config.path))
    check_same_tokenizer(info, run.data)
    student, has_own_ranks = run.layout, run.split is not None
    num_ranks = student.world_size if run.split is None else run.split.num_teachers
    tensor = config.tensor_model_parallel_size or (1 if has_own_ranks else student.tensor)
    pipeline = config.pipeline_model_parallel_size or (1 if has_own_ranks else student.pipeline)
    if num_ranks % (tensor * pipeline):
        raise LayoutError(
            f"{num_ranks} ranks do not divide into teacher.tensor_model_parallel_size x "
            f"teacher.pipeline_model_parallel_size = {tensor} x {pipeline} = {tensor * pipeline}"
        )
    wanted = student.sequence_parallel if config.sequence_parallel is None else config.sequence_parallel
    layout = ParallelLayout(
        tensor=tensor,
        pipeline=pipeline,
        context=1,
        data=num_ranks // (tensor * pipeline),
        sequence_parallel=wanted and tensor > 1,
    )
    _check_model(info, layout, run.seq_length)
    return TeacherPlan(info, layout)


def _check_model(info: CheckpointInfo, layout: ParallelLayout, seq_length: int) -> None:
    try:
        layout.check_model(info.architecture, seq_length)
    except LayoutError as error:
        raise LayoutError(f"the teacher {info.path} under {layout.describe()}: {error}") from None


def load_teacher(plan: TeacherPlan, run: StudentRun, groups: ProcessGroupCollection) -> list[HiddenStateGPTModel]:
    """Load this rank's model chunks, frozen. Collective over the default group.

    Args:
        groups: the teacher's.
    """
    model_chunks = build_model(
        plan.info.architecture,
        plan.layout,
        groups,
        precision=run.precision,
        device=run.device,
        layer_spec=run.layer_spec,
        max_sequence_length=run.seq_length,
    )
    load_weights(model_chunks, groups, plan.info)
    for model_chunk in model_chunks:
        model_chunk.requires_grad_(False)
        model_chunk.eval()
    return model_chunks
