"""Build what differs between methods: the source of a step's micro-batches, and the losses by role."""

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.generation.decoder import Decoder
from megatron_kd.generation.generate import MixedPolicy, ModelPolicy
from megatron_kd.losses.types import LM_ONLY
from megatron_kd.teachers.interface import Teacher
from megatron_kd.training.methods.generated_text import PolicyMaker, RolloutGenerator
from megatron_kd.training.methods.method_table import METHODS, Method
from megatron_kd.training.methods.pretraining import PretrainingBeside, PretrainingLoss
from megatron_kd.training.methods.source import BatchSource, DatasetSource
from megatron_kd.training.objective import (
    BatchLoss,
    DistillationLoss,
    FusedLoss,
    MicroBatchLoss,
    build_objective,
    unwrap,
)
from megatron_kd.training.train_config import TrainConfig
from megatron_kd.training.training_run import TrainingRun


@dataclass(frozen=True)
class MethodParts:
    """What a method builds its source and its loss from.

    Attributes:
        run: configuration, data, layout and sizes.
        groups: the student's.
        model: the student's DDP-wrapped model chunks on this rank.
        fused: the fused loss, shared by all losses of the run.
    """

    run: TrainingRun
    groups: ProcessGroupCollection
    model: list[DistributedDataParallel]
    teacher: Teacher | None
    fused: FusedLoss

    @property
    def config(self) -> TrainConfig:
        """The configuration of the run."""
        return self.run.config

    @property
    def settings(self) -> Any:
        """The method's own section, of the class that its record names."""
        return self.config.distillation.settings

    def rollout_generator(self) -> RolloutGenerator:
        """Return a generator of responses to the prompts of the dataset."""
        return RolloutGenerator(
            self.config.distillation.rollout,
            self.run.data,
            self.groups,
            seq_length=self.run.seq_length,
            seed=self.config.training.seed,
            device=self.run.device,
        )

    def student_policy(self, record: bool = False) -> PolicyMaker:
        """Return the student as a policy; ``record`` keeps the log-probability of every drawn id."""
        return lambda rows, length: ModelPolicy(self._student(rows, length), record)

    def teacher_policy(self) -> PolicyMaker:
        """Return the teacher as a policy.

        Raises:
            LayoutError: its layout is not the student's.
        """
        self._teacher(1, 1)
        return lambda rows, length: ModelPolicy(self._teacher(rows, length))

    def mixed_policy(self, teacher_share: float) -> PolicyMaker:
        """Return the mixture of teacher and student as a policy that records both.

        Raises:
            LayoutError: the teacher's layout is not the student's.
        """
        self._teacher(1, 1)
        return lambda rows, length: MixedPolicy(self._student(rows, length), self._teacher(rows, length), teacher_share)

    def _student(self, rows: int, length: int) -> Decoder:
        model_chunks = [unwrap(model_chunk) for model_chunk in self.model]
        return Decoder(model_chunks, self.groups, rows, length, vocab_size=self.run.data.vocab_size)

    def _teacher(self, rows: int, length: int) -> Decoder:
        assert self.teacher is not None  # the method needs one: checked with the configuration
        return self.teacher.decoder(self.groups, rows, length, self.run.data.vocab_size)


def build_losses(parts: MethodParts) -> dict[str, BatchLoss]:
    """Build the loss of every role that the method's micro-batches have."""
    config, module = parts.config, _module_of(_method(parts))
    settings, reduction = config.distillation, config.training.loss_reduction
    objective = build_objective(settings)
    losses: dict[str, BatchLoss] = {}
    if module is not None and hasattr(module, "build_loss"):
        losses["main"] = module.build_loss(parts)
    else:
        losses["main"] = DistillationLoss(
            objective, parts.fused, reduction, reports_tail_mass=config.teacher.gives_sparse_knowledge
        )
    if settings.pretraining_weight > 0:
        beside = objective if settings.pretraining_uses_teacher else LM_ONLY
        losses["pretraining"] = PretrainingLoss(beside, parts.fused, reduction)
    return losses


def build_source(parts: MethodParts, losses: Mapping[str, BatchLoss]) -> BatchSource:
    """Build the source of the micro-batches that a step trains on.

    Raises:
        LayoutError: the method generates with a teacher whose layout is not the student's.
        ConfigError: prompts leave no room for responses.
    """
    module = _module_of(_method(parts))
    if module is None or not hasattr(module, "build_source"):
        return DatasetSource()
    source: BatchSource = module.build_source(parts)
    weight = parts.config.distillation.pretraining_weight
    if weight == 0:
        return source
    return PretrainingBeside(source, weight, parts.groups, losses["main"].count, losses["pretraining"].count)


def build_lm_term(config: TrainConfig, fused: FusedLoss) -> MicroBatchLoss | None:
    """Build the LM term of the loss with its weight, without a teacher; None unless ``metrics`` asks for ratios."""
    if config.metrics.kd_lm_gradient_ratio_interval is None:
        return None
    objective = dataclasses.replace(build_objective(config.distillation), kd_weight=0.0)
    return MicroBatchLoss({"main": DistillationLoss(objective, fused, config.training.loss_reduction)}, None)


def _method(parts: MethodParts) -> Method:
    return METHODS[parts.config.distillation.method]


def _module_of(method: Method) -> ModuleType | None:
    return None if method.module is None else importlib.import_module(method.module)
