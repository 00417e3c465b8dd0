"""What a plan is about: models, where the teacher runs, layouts and batch sizes, checked as training checks them."""

from dataclasses import dataclass
from typing import Any

from megatron_kd.costs.flops import FORWARD_FLOPS_PER_PARAMETER, PRETRAINING, MethodCost, training_flops
from megatron_kd.costs.memory import PlacedTeacher, teacher_layout
from megatron_kd.errors import ConfigError, LayoutError
from megatron_kd.models.architecture import ModelArchitecture, architecture_by_name
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.planning.overheads import teacher_head_flops
from megatron_kd.teachers.teacher_config import NO_TEACHER
from megatron_kd.training.methods.method_table import METHODS
from megatron_kd.training.train_config import TrainConfig

TOY_VOCABULARY = 512


@dataclass(frozen=True)
class Setting:
    """What all parts of a plan start from.

    Attributes:
        teacher: the architecture of ``plan.teacher``, whether it runs or not.
        cost: FLOPs of the training method; those of pre-training where teacher targets come from a cache.
        placed: the teacher, if it runs while the student trains; otherwise None.
        layout: the student's.
        sizes: precision, micro_batch_size, seq_length, micro_batches.
        loss_tile_budget: bytes of the fused loss's tiles; None for the default.
    """

    student: ModelArchitecture
    teacher: ModelArchitecture | None
    reference: ModelArchitecture
    cost: MethodCost
    placed: PlacedTeacher | None
    layout: ParallelLayout
    sizes: dict[str, Any]
    loss_tile_budget: int | None = None

    @property
    def dense_teacher(self) -> ModelArchitecture | None:
        """The teacher whose output layer the student's last stage computes, or None."""
        return self.placed.architecture if self.placed is not None and self.placed.is_dense else None

    @property
    def flops_per_token(self) -> int:
        """FLOPs of training on one token, the teacher's forward pass counted."""
        parameters = self.placed.architecture.parameters if self.placed is not None else 0
        return training_flops(self.student.parameters, 1, self.cost, parameters)

    @property
    def head_share(self) -> float:
        """FLOPs of the teacher's output layer over the student's own; 0 where the student does not compute it."""
        return self.head_share_if_dense if self.dense_teacher is not None else 0.0

    @property
    def head_share_if_dense(self) -> float:
        """The head share that hidden states as payload would give; 0 without a teacher."""
        if self.placed is None:
            return 0.0
        return teacher_head_flops(self.placed.architecture) / (6 * self.student.parameters)


@dataclass(frozen=True)
class RemoteBalance:
    """How the work of a step divides over a remote teacher's ranks and the student's.

    Attributes:
        teacher_share: the teacher's share of the step's FLOPs, without an output layer that the student computes.
        slowdown: time of a step over its time if the work were spread evenly over all GPUs; 1 is perfect.
        balanced_ranks: the number of teacher ranks that comes closest to an even spread.
    """

    teacher_share: float
    teacher_ranks: int
    num_gpus: int
    slowdown: float
    balanced_ranks: int


def setting_of(config: TrainConfig) -> Setting:
    """Return the setting that a configuration describes.

    Raises:
        ConfigError: the method needs a teacher that plan.teacher does not name.
        LayoutError: the layout does not divide the model, the batch or the number of GPUs.
    """
    student = _architecture(config.model.name)
    teacher = _architecture(config.plan.teacher) if config.plan.teacher is not None else None
    cost = _cost(config, teacher)
    runs = cost.teacher > 0
    remote_ranks = config.teacher.own_ranks if runs else 0
    if remote_ranks >= config.plan.num_gpus:
        raise LayoutError(
            f"teacher.num_ranks {remote_ranks} leaves none of the plan.num_gpus {config.plan.num_gpus} GPUs for the "
            "student"
        )
    layout = ParallelLayout.for_world(config.parallel, config.plan.num_gpus - remote_ranks)
    seq_length = config.data.seq_length or config.plan.seq_length
    _check(layout, student, "student", seq_length)
    placed = _place(config, teacher, layout, remote_ranks) if runs and teacher is not None else None
    if placed is not None:
        _check(placed.layout, placed.architecture, "teacher", seq_length)
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
        cost,
        placed,
        layout,
        sizes,
        config.distillation.loss.tile_bytes,
    )


def remote_balance(setting: Setting, num_gpus: int) -> RemoteBalance | None:
    """Return the balance between a remote teacher and its student; None without a remote teacher."""
    placed = setting.placed
    if placed is None or not placed.is_remote:
        return None
    student_flops = float(6 * setting.student.parameters)
    teacher_flops = float(FORWARD_FLOPS_PER_PARAMETER * placed.architecture.parameters)
    if setting.dense_teacher is not None:
        head = teacher_head_flops(setting.dense_teacher)
        student_flops, teacher_flops = student_flops + head, teacher_flops - head
    share, ranks = teacher_flops / (student_flops + teacher_flops), placed.layout.world_size
    slowdown = num_gpus * max(share / ranks, (1 - share) / (num_gpus - ranks))
    return RemoteBalance(share, ranks, num_gpus, slowdown, min(max(1, round(share * num_gpus)), num_gpus - 1))


def _architecture(name: str) -> ModelArchitecture:
    return architecture_by_name(name).with_vocab_size(TOY_VOCABULARY)


def _cost(config: TrainConfig, teacher: ModelArchitecture | None) -> MethodCost:
    """Return the cost of the run's method; a cached teacher costs nothing while training."""
    method = METHODS[config.distillation.method]
    if method.needs_teacher and teacher is None:
        raise ConfigError(f"distillation.method '{method.name}' runs a teacher: name its architecture in plan.teacher")
    costs_nothing = config.teacher.placement != NO_TEACHER and not config.teacher.runs_a_model
    return PRETRAINING if costs_nothing else method.cost


def _place(config: TrainConfig, teacher: ModelArchitecture, layout: ParallelLayout, remote_ranks: int) -> PlacedTeacher:
    keys = config.teacher
    tensor, pipeline = keys.tensor_model_parallel_size, keys.pipeline_model_parallel_size
    if not remote_ranks:
        return PlacedTeacher(teacher, teacher_layout(layout, tensor, pipeline), stash_bytes=keys.stash_megabytes << 20)
    own = ParallelConfig(tensor_model_parallel_size=tensor or 1, pipeline_model_parallel_size=pipeline or 1)
    try:
        ranks = ParallelLayout.for_world(own, remote_ranks)
    except LayoutError as error:
        raise LayoutError(f"the teacher's ranks (teacher.num_ranks): {error}") from None
    return PlacedTeacher(
        teacher, ranks, is_remote=True, payload_ids=keys.payload_ids, prefetch_depth=keys.prefetch_depth
    )


def _check(layout: ParallelLayout, model: ModelArchitecture, role: str, seq_length: int) -> None:
    try:
        layout.check_model(model, seq_length)
    except LayoutError as error:
        raise LayoutError(f"the {role} under {layout.describe()}: {error}") from None
