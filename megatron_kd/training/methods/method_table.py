"""Training methods: one record each, from which their keys, checks, costs and builders follow.

A new method is one file beside this one, and one row of :data:`METHODS` with the class of its keys: docs/extending.md
adds one. Importing this loads no torch, so that a configuration is read at once. Defaults of the settings are those of
the released codes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_kd.costs.flops import MethodCost


def no_faults(config: Any) -> Iterator[str]:
    """Yield nothing: every configuration that passes the common checks will do."""
    return iter(())


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        name: value of ``distillation.method``.
        summary: what is trained on what, in one line.
        cost: FLOPs of a step.
        paper: where it is described.
        module: defines what differs from the common path, ``build_source(parts)`` (which micro-batches a step
            trains on; otherwise the dataset's) and ``build_loss(parts)`` (otherwise the weighted LM term and
            divergence). ``parts`` is a :class:`~megatron_kd.training.methods.method_builders.MethodParts`. None: it
            differs in nothing.
        settings: class of its keys, ``distillation.<name>.*``. None: it has no keys of its own.
        kd_ratio, divergence: defaults of ``distillation.kd_ratio`` and ``distillation.divergence``.
        objective: the loss that those two and ``distillation.temperature`` describe; ``pretraining`` is the one beside
            generated text (``distillation.pretraining_weight``).
        needs_teacher: without one it is refused, and a teacher is refused without it.
        generates_text: it trains on text generated during training. Then the teacher must know any text, sequences
            cannot be split over ranks, and ``distillation.rollout`` and ``.pretraining_weight`` apply.
        needs_plain_sampling: generated text must come from the models' own distributions.
        needs_whole_distribution: a few ids of the teacher's distribution are not enough, whatever the divergence.
        needs_heldout_loss: its source is told the held-out loss, once before the first step.
        allows_beta_0_and_1: ``distillation.beta`` 0 and 1 stand for forward and reverse KL.
        faults: yields what else is wrong with a ``TrainConfig``, one message each.
    """

    name: str
    summary: str
    cost: MethodCost
    paper: str | None = None
    module: str | None = None
    settings: type[Any] | None = None
    kd_ratio: float = 0.0
    divergence: str = "forward_kl"
    objective: Literal["main", "pretraining"] = "main"
    needs_teacher: bool = True
    generates_text: bool = False
    needs_plain_sampling: bool = False
    needs_whole_distribution: bool = False
    needs_heldout_loss: bool = False
    allows_beta_0_and_1: bool = False
    faults: Callable[[Any], Iterator[str]] = no_faults


@dataclass(frozen=True)
class GKDConfig:
    """The ``distillation.gkd.*`` keys: Generalized Knowledge Distillation (arXiv 2306.13649)."""

    student_fraction: float = 0.5
    """λ: the probability that a step trains on the student's own text."""
    seq_kd: bool = False
    """Train the other steps on the teacher's text instead of the dataset's."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if not 0 <= self.student_fraction <= 1:
            yield f"'distillation.gkd.student_fraction' must be between 0 and 1, not {self.student_fraction}"


@dataclass(frozen=True)
class DistiLLMConfig:
    """The ``distillation.distillm.*`` keys: DistiLLM (arXiv 2402.03898)."""

    initial_threshold: float = 0.0
    """φ at the start: the probability that a step trains on the student's text, new or from the buffer."""
    threshold_step: float = 0.1
    """Added to φ when the held-out loss has risen."""
    loss_margin: float = 0.1
    """How far the held-out loss must rise for that, nats per token."""
    replay_schedule: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """The probability of new text over the run: φ (1 - step / steps), φ / 2, φ step / steps."""
    replay_capacity: int = 1000
    """Sequences kept for the whole run, first in first out."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        for name in ("initial_threshold", "threshold_step"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"'distillation.distillm.{name}' must be between 0 and 1, not {getattr(self, name)}"
        if self.replay_capacity < 1:
            yield f"'distillation.distillm.replay_capacity' must be at least 1, not {self.replay_capacity}"


@dataclass(frozen=True)
class MiniLLMConfig:
    """The ``distillation.minillm.*`` keys: MiniLLM (arXiv 2306.08543)."""

    variant: Literal["paper", "released"] = "paper"
    """``released`` follows the authors' code, which differs (docs/methods.md)."""
    teacher_mix: float = 0.2
    """α: text is drawn from α · teacher + (1 - α) · student. 0 is the student alone, which any teacher can score."""
    importance: Literal["token", "sequence"] = "token"
    """``token`` weighs each token by its own ratio, as the method does; ``sequence`` by the product over the response,
    which has no bias and a large variance."""
    clip: float | None = 0.2
    """ε of the clipped policy term; None does not clip."""
    length_norm: bool = True
    """Divide the sum of the rewards to come by their number."""
    inner_epochs: int = 1
    """Steps in a row that train on the same rollouts (the paper's: 4), each weighted by the policy it starts from."""
    single_step: bool = True
    """Compute the expectation over the next token exactly: the reverse KL of its distribution."""
    reward_scaling: float = 0.5
    """``released``: divisor of the rewards."""
    reward_clip: float = 100.0
    """``released``: bound of the rewards after that."""
    discount: float = 0.95
    """``released``: γ."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if not 0 <= self.teacher_mix < 1:
            yield f"'distillation.minillm.teacher_mix' must be in [0, 1), not {self.teacher_mix}"
        if self.clip is not None and self.clip <= 0:
            yield f"'distillation.minillm.clip' must be above 0 or null, not {self.clip}"
        if self.inner_epochs < 1:
            yield f"'distillation.minillm.inner_epochs' must be at least 1, not {self.inner_epochs}"
        if self.reward_scaling <= 0 or self.reward_clip <= 0:
            yield "'distillation.minillm.reward_scaling' and '.reward_clip' must be above 0"
        if not 0 <= self.discount <= 1:
            yield f"'distillation.minillm.discount' must be between 0 and 1, not {self.discount}"


def _gkd_faults(config: Any) -> Iterator[str]:
    if config.distillation.gkd.seq_kd:
        yield from _generating_teacher_faults(config, "leave out distillation.gkd.seq_kd")


def _distillm_faults(config: Any) -> Iterator[str]:
    capacity, batch = config.distillation.distillm.replay_capacity, config.training.global_batch_size
    if capacity < batch:
        yield f"'distillation.distillm.replay_capacity' {capacity} is below 'training.global_batch_size' {batch}"


def _minillm_faults(config: Any) -> Iterator[str]:
    if config.distillation.minillm.teacher_mix > 0:
        yield from _generating_teacher_faults(config, "set distillation.minillm.teacher_mix=0")


def _generating_teacher_faults(config: Any, otherwise: str) -> Iterator[str]:
    teacher = config.teacher
    if teacher.runs_a_model and not teacher.where.generates:
        yield (
            f"'distillation.method' {config.distillation.method} lets the teacher generate token by token, which "
            f"'teacher.placement' {teacher.placement} does not: use a colocated teacher, or {otherwise}"
        )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "none",
            "pre-training: the LM loss on the dataset",
            MethodCost(student=6),
            needs_teacher=False,
        ),
        Method(
            "vanilla_kd",
            "LM loss and divergence from the teacher on the dataset",
            MethodCost(student=6, teacher=2),
            kd_ratio=0.5,
        ),
        Method(
            "gkd",
            "divergence from the teacher on text of the student, the teacher or the dataset",
            MethodCost(student=6, teacher=2),
            paper="arXiv 2306.13649",
            module="megatron_kd.training.methods.gkd",
            settings=GKDConfig,
            kd_ratio=1.0,
            divergence="jsd",
            generates_text=True,
            allows_beta_0_and_1=True,
            faults=_gkd_faults,
        ),
        Method(
            "distillm",
            "skewed divergence from the teacher on new or replayed text of the student, or on the dataset",
            MethodCost(student=6, teacher=2),
            paper="arXiv 2402.03898",
            module="megatron_kd.training.methods.distillm",
            settings=DistiLLMConfig,
            kd_ratio=1.0,
            divergence="skew_reverse_kl",
            generates_text=True,
            needs_heldout_loss=True,
            faults=_distillm_faults,
        ),
        Method(
            "minillm",
            "policy gradient and reverse KL on text drawn from a mixture of teacher and student",
            MethodCost(student=6, teacher=2, student_rollout=2, teacher_rollout=2),
            paper="arXiv 2306.08543",
            module="megatron_kd.training.methods.minillm",
            settings=MiniLLMConfig,
            objective="pretraining",
            generates_text=True,
            needs_plain_sampling=True,
            needs_whole_distribution=True,
            faults=_minillm_faults,
        ),
    )
}
"""All methods by name, in the order in which their keys and costs are listed."""
