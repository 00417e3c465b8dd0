"""From the ``teacher.*`` keys to a teacher: its layout, its weights, and how it is placed."""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.checkpoints.weights import CheckpointInfo, load_weights
from megatron_kd.errors import LayoutError
from megatron_kd.losses import OutputHead
from megatron_kd.models.architecture import LayerSpecName, ModelArchitecture, Precision
from megatron_kd.models.gpt import HiddenStateGPTModel, build_model, padded_vocab_size
from megatron_kd.parallel.groups import create_process_groups, is_last_stage
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.parallel.runtime import SplitWorld, seed_everything
from megatron_kd.teachers.cache.codec import Codec
from megatron_kd.teachers.cache.kept_ids import Selection
from megatron_kd.teachers.cached import choose_kind
from megatron_kd.teachers.colocated import ColocatedTeacher
from megatron_kd.teachers.interface import TeacherConfig
from megatron_kd.teachers.remote.payloads import HiddenStates, Payload, SparseEntries
from megatron_kd.teachers.remote.routing import Routing
from megatron_kd.teachers.remote.student_side import RemoteTeacher
from megatron_kd.teachers.remote.teacher_side import ScheduledBatches, TeacherRanks
from megatron_kd.teachers.remote.transport import Bridge, GroupCarrier, OrderLog, reshard_head


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
    routing = Routing(layout, own, ranks, ranks)
    same_groups = routing.shares_stages and layout.context == 1
    teacher_groups = groups if same_groups else create_process_groups(own)
    carrier = None if same_groups and student_rows == teacher_rows else GroupCarrier(dist.new_group(list(ranks)))
    chunks = load_teacher(
        info, own, teacher_groups, precision=precision, layer_spec=layer_spec, seq_length=seq_length, device=device
    )
    return ColocatedTeacher(
        chunks,
        teacher_groups,
        student_groups=groups,
        routing=routing,
        student_rows=student_rows,
        stash_bytes=config.stash_megabytes << 20,
        carrier=carrier,
    )


def build_remote(
    config: TeacherConfig,
    info: CheckpointInfo,
    student: ModelArchitecture,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    split: SplitWorld,
    *,
    precision: Precision,
    seq_length: int,
    train_iters: int,
    sparse_target: str,
    device: torch.device,
) -> RemoteTeacher:
    """The student's end of a teacher on ranks of its own; the arguments are those of :func:`build_colocated`."""
    own = plan_teacher_layout(config, info, layout, split.num_teachers, seq_length)
    routing, bridge, orders = _remote_parts(layout, own, split)
    like = torch.empty(0, dtype=_dtype(precision), device=device)
    head: OutputHead | None = None
    payload: Payload = HiddenStates(info.architecture.hidden_size, like.dtype)
    if config.payload == "hidden":
        head = _remote_head(None, info, student, routing, bridge, like)
    else:
        codec = payload_codec(config, info)
        payload = SparseEntries(codec, choose_kind(codec, sparse_target, f"teacher.payload {config.payload}"))
    return RemoteTeacher(
        bridge,
        orders,
        routing,
        groups,
        payload,
        head,
        prefetch_depth=config.prefetch_depth,
        train_iters=train_iters,
    )


def build_teacher_ranks(
    config: TeacherConfig,
    info: CheckpointInfo,
    student: ModelArchitecture,
    layout: ParallelLayout,
    split: SplitWorld,
    batches: ScheduledBatches,
    *,
    precision: Precision,
    layer_spec: LayerSpecName,
    seq_length: int,
    temperature: float,
    device: torch.device,
) -> TeacherRanks:
    """The teacher's end: on its ranks, with its weights. Collective over them.

    Args:
        layout: the student's.
        temperature: of the distributions that sparse payloads are made of.
    """
    own = plan_teacher_layout(config, info, layout, split.num_teachers, seq_length)
    groups = create_process_groups(own)
    seed_everything(0, groups)
    chunks = load_teacher(
        info, own, groups, precision=precision, layer_spec=layer_spec, seq_length=seq_length, device=device
    )
    routing, bridge, orders = _remote_parts(layout, own, split)
    like = next(chunks[0].parameters())
    own_head = chunks[-1].output_head() if is_last_stage(groups) else None
    payload: Payload = HiddenStates(info.architecture.hidden_size, like.dtype)
    if config.payload == "hidden":
        _remote_head(own_head, info, student, routing, bridge, like)
    else:
        codec = payload_codec(config, info)
        selection = None if own_head is None else Selection(codec, own_head, groups.tp, temperature)
        payload = SparseEntries(codec, choose_kind(codec, "auto", "the payload"), selection)
    return TeacherRanks(
        chunks, groups, routing, bridge, orders, batches, payload, prefetch_depth=config.prefetch_depth, device=device
    )


def payload_codec(config: TeacherConfig, info: CheckpointInfo) -> Codec:
    """What a sparse payload chooses, as the cache of the same settings would."""
    size = config.num_draws if config.payload == "sampled" else config.top_k
    return Codec(config.payload, size, info.architecture.vocab_size)


def _remote_parts(student: ParallelLayout, own: ParallelLayout, split: SplitWorld) -> tuple[Routing, Bridge, OrderLog]:
    ranks = range(split.world_size)
    routing = Routing(student, own, ranks[: split.num_students], ranks[split.num_students :])
    return routing, Bridge(split.bridge), OrderLog(split.store)


def _remote_head(
    own: OutputHead | None,
    info: CheckpointInfo,
    student: ModelArchitecture,
    routing: Routing,
    bridge: Bridge,
    like: torch.Tensor,
) -> OutputHead | None:
    """The teacher's output layer, sent once: on the student's last stages; None elsewhere."""
    return reshard_head(
        own,
        routing,
        bridge,
        student_rows=padded_vocab_size(student.vocab_size, routing.student.tensor) // routing.student.tensor,
        valid_vocab_size=info.architecture.vocab_size,
        hidden_size=info.architecture.hidden_size,
        like=like,
    )


def _dtype(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32
