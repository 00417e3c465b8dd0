"""From the ``teacher.*`` keys to a teacher: its layout, its weights, and how it is placed."""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.errors import LayoutError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.models.gpt import HiddenStateGPTModel, Precision, build_model, padded_vocab_size
from megatron_kd.models.layer_specs import LayerSpecName
from megatron_kd.models.weights import CheckpointInfo, load_weights
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.teachers.colocated import ColocatedTeacher
from megatron_kd.teachers.interface import TeacherConfig
from megatron_kd.teachers.routing import Routing


def plan_teacher_layout(
    config: TeacherConfig, info: CheckpointInfo, student: ParallelLayout, num_ranks: int, seq_length: int
) -> ParallelLayout:
    """The teacher's layout over ``num_ranks``, filled up with data parallelism, checked against the model.

    Raises:
        LayoutError: it does not divide the ranks or the model.
    """
    own_ranks = config.placement == "remote"
    tensor = config.tensor_model_parallel_size or (1 if own_ranks else student.tensor)
    pipeline = config.pipeline_model_parallel_size or (1 if own_ranks else student.pipeline)
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
    shape = info.architecture
    try:
        layout.check_model(
            num_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_query_groups=shape.num_query_groups,
            ffn_hidden_size=shape.ffn_hidden_size,
            seq_length=seq_length,
        )
    except LayoutError as error:
        raise LayoutError(f"the teacher {info.path} under {layout.describe()}: {error}") from None
    return layout


def load_teacher(
    info: CheckpointInfo,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    *,
    precision: Precision,
    layer_spec: LayerSpecName,
    seq_length: int,
    device: torch.device,
) -> list[HiddenStateGPTModel]:
    """This rank's frozen chunks of the teacher. Collective over the default group."""
    chunks = build_model(
        info.architecture,
        layout,
        groups,
        precision=precision,
        device=device,
        layer_spec=layer_spec,
        max_sequence_length=seq_length,
    )
    load_weights(chunks, groups, info)
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return chunks


def build_colocated(
    config: TeacherConfig,
    info: CheckpointInfo,
    student: ModelArchitecture,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    *,
    precision: Precision,
    layer_spec: LayerSpecName,
    seq_length: int,
    device: torch.device,
) -> ColocatedTeacher:
    """A teacher on the student's ranks. Collective over the world.

    Args:
        student: the student's architecture; its vocabulary decides which rows of the teacher's head go where.
        layout: the student's.
        groups: the student's.
    """
    ranks = range(layout.world_size)
    own = plan_teacher_layout(config, info, layout, len(ranks), seq_length)
    student_rows = padded_vocab_size(student.vocab_size, layout.tensor) // layout.tensor
    teacher_rows = padded_vocab_size(info.architecture.vocab_size, own.tensor) // own.tensor
    same_place = (own.tensor, own.pipeline) == (layout.tensor, layout.pipeline)
    teacher_groups = groups if same_place else create_process_groups(own)
    carrier = None if same_place and student_rows == teacher_rows else dist.new_group(list(ranks))
    chunks = load_teacher(
        info, own, teacher_groups, precision=precision, layer_spec=layer_spec, seq_length=seq_length, device=device
    )
    return ColocatedTeacher(
        chunks,
        teacher_groups,
        student_groups=groups,
        routing=Routing(layout, own, ranks, ranks),
        student_rows=student_rows,
        stash_bytes=config.stash_megabytes << 20,
        carrier=carrier,
    )
