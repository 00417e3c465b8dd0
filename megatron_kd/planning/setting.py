"""What is planned: models, the teacher's place, layouts and sizes, from a configuration; checked as training does."""

from dataclasses import dataclass
from typing import Any

from megatron_kd.costs.flops import FORWARD_FLOPS_PER_PARAMETER, METHOD_FLOPS, training_flops
from megatron_kd.costs.memory import PlacedTeacher, teacher_layout
from megatron_kd.errors import ConfigError, LayoutError
from megatron_kd.models.architecture import ModelArchitecture, architecture_by_name
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.planning.pipeline_costs import teacher_head_flops
from megatron_kd.planning.plan_config import PlanRunConfig

TOY_VOCABULARY = 512


@dataclass(frozen=True)
class Setting:
    """What all parts of a plan start from.

    Attributes:
        teacher: plan.teacher, whether it runs or not.
        method: whose FLOPs the run costs; ``none`` where knowledge comes from a cache.
        placed: a teacher that runs; None otherwise.
        layout: the student's.
        sizes: precision, micro_batch_size, seq_length, micro_batches.
        loss_tile_budget: bytes of the fused loss's tiles; None for the default.
    """

    student: ModelArchitecture
    teacher: ModelArchitecture | None
    reference: ModelArchitecture
    method: str
    placed: PlacedTeacher | None
    layout: ParallelLayout
    sizes: dict[str, Any]
    loss_tile_budget: int | None = None

    @property
    def dense_teacher(self) -> ModelArchitecture | None:
        """The teacher whose output layer the student's last stage computes."""
        return self.placed.architecture if self.placed is not None and self.placed.is_dense else None

    @property
    def flops_per_token(self) -> int:
        """Of training, the teacher's forward pass counted."""
        parameters = self.placed.architecture.parameters if self.placed is not None else 0
        return training_flops(self.student.parameters, 1, self.method, parameters)

    @property
    def head_share(self) -> float:
        """FLOPs of the teacher's output layer over the student's own; 0 where the student does not compute it."""
        return self.head_share_if_dense if self.dense_teacher is not None else 0.0

    @property
    def head_share_if_dense(self) -> float:
        """The same for hidden states as payload, whatever the payload is; 0 without a teacher."""
        if self.placed is None:
            return 0.0
        return teacher_head_flops(self.placed.architecture) / (6 * self.student.parameters)


@dataclass(frozen=True)
class RemoteBalance:
    """How the work of a step divides over a remote teacher's ranks and the student's.

    Attributes:
        teacher_share: of the step's FLOPs, without an output layer that the student's last stage computes.
        busy: how much longer a step takes than if the work were spread evenly over all GPUs; 1 is perfect.
        balanced_ranks: the teacher's ranks for which it would be.
    """

    teacher_share: float
    teacher_ranks: int
    num_gpus: int
    busy: float
    balanced_ranks: int


def setting_of(config: PlanRunConfig) -> Setting:
    """The setting of a configuration.

    Raises:
        ConfigError: the method needs a teacher that plan.teacher does not name.
        LayoutError: the layout does not divide the model, the batch or the number of GPUs.
    """
    student = _architecture(config.model.name)
    teacher = _architecture(config.plan.teacher) if config.plan.teacher is not None else None
    method = _method_with_formula(config, teacher)
    runs = teacher is not None and method != "none"
    away = config.teacher.num_ranks if runs and config.teacher.placement == "remote" else 0
    if away and away >= config.plan.num_gpus:
        raise LayoutError(
            f"teacher.num_ranks {away} leaves no GPU of plan.num_gpus {config.plan.num_gpus} to the student"
        )
    layout = ParallelLayout.for_world(config.parallel, config.plan.num_gpus - away)
    seq_length = config.data.seq_length or config.plan.seq_length
    _check(layout, student, "student", seq_length)
    placed = _place(config, teacher, layout, away) if runs else None
    if placed is not None:
        _check(placed.layout, teacher, "teacher", seq_length)
    training = config.training
    sizes = {
        "precision": training.precision,
        "micro_batch_size": training.micro_batch_size,
        "seq_length": seq_length,
        "micro_batches": layout.micro_batches(training.global_batch_size, training.micro_batch_size),
    }
    return Setting(
        student,
        teacher,
        _architecture(config.plan.reference),
        method,
        placed,
        layout,
        sizes,
        config.distillation.loss.tile_bytes,
    )


def remote_balance(setting: Setting, num_gpus: int) -> RemoteBalance | None:
    """The balance between a remote teacher and its student; None without one."""
    placed = setting.placed
    if placed is None or not placed.is_remote:
        return None
    student_flops = 6 * setting.student.parameters
    teacher_flops = FORWARD_FLOPS_PER_PARAMETER * placed.architecture.parameters
    if setting.dense_teacher is not None:
        head = teacher_head_flops(setting.dense_teacher)
        student_flops, teacher_flops = student_flops + head, teacher_flops - head
    share, ranks = teacher_flops / (student_flops + teacher_flops), placed.layout.world_size
    busy = num_gpus * max(share / ranks, (1 - share) / (num_gpus - ranks))
    return RemoteBalance(share, ranks, num_gpus, busy, min(max(1, round(share * num_gpus)), num_gpus - 1))


def _architecture(name: str) -> ModelArchitecture:
    return architecture_by_name(name).with_vocab_size(TOY_VOCABULARY)


def _method_with_formula(config: PlanRunConfig, teacher: ModelArchitecture | None) -> str:
    """The training method; a cached teacher costs nothing while training."""
    method = config.distillation.method
    if method not in METHOD_FLOPS:
        raise ConfigError(f"distillation.method '{method}' has no cost formula; plan one of {', '.join(METHOD_FLOPS)}")
    if METHOD_FLOPS[method][1] and teacher is None:
        raise ConfigError(f"distillation.method '{method}' runs a teacher: name its architecture in plan.teacher")
    return "none" if config.teacher.placement == "cached" else method


def _place(config: PlanRunConfig, teacher: ModelArchitecture, layout: ParallelLayout, away: int) -> PlacedTeacher:
    keys = config.teacher
    tensor, pipeline = keys.tensor_model_parallel_size, keys.pipeline_model_parallel_size
    if not away:
        return PlacedTeacher(teacher, teacher_layout(layout, tensor, pipeline), stash_bytes=keys.stash_megabytes << 20)
    own = ParallelConfig(tensor_model_parallel_size=tensor or 1, pipeline_model_parallel_size=pipeline or 1)
    try:
        ranks = ParallelLayout.for_world(own, away)
    except LayoutError as error:
        raise LayoutError(f"the teacher's ranks (teacher.num_ranks): {error}") from None
    return PlacedTeacher(
        teacher, ranks, is_remote=True, payload_ids=keys.payload_ids, prefetch_depth=keys.prefetch_depth
    )


def _check(layout: ParallelLayout, model: ModelArchitecture, role: str, seq_length: int) -> None:
    try:
        layout.check_model(
            num_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            ffn_hidden_size=model.ffn_hidden_size,
            seq_length=seq_length,
        )
    except LayoutError as error:
        raise LayoutError(f"the {role} under {layout.describe()}: {error}") from None
