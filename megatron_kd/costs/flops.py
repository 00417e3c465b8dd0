"""What training costs in floating-point operations, and how many steps make two methods cost the same.

The convention is the MiniPLM paper's (arXiv 2410.17215): a forward pass costs 2N per token and a backward pass twice
that, N being **all parameters of the model, tied weights once** (:attr:`ModelArchitecture.parameters`). Attention's
quadratic term is left out. Every function takes N, so that a caller may count parameters in another way.

Generating costs 2N per token, prompt included: with a key-value cache every token passes the model once.

Work done once before training (scoring a corpus, training the reference model) is *offline*: it is reported beside the
training cost and not matched, because every student trained on the result shares it.
"""

from dataclasses import dataclass

FORWARD_FLOPS_PER_PARAMETER = 2
TRAINING_FLOPS_PER_PARAMETER = 6


@dataclass(frozen=True)
class MethodCost:
    """FLOPs per parameter and token of a training step. Each method has one, in ``training/methods/method_table.py``.

    Attributes:
        student, teacher: forward and backward passes over the step's micro-batches.
        student_rollout, teacher_rollout: forward passes that generate, or score, the text of every step. Both are 0
            where the share of steps with new text depends on settings and run: such text is counted apart.
    """

    student: int = TRAINING_FLOPS_PER_PARAMETER
    teacher: int = 0
    student_rollout: int = 0
    teacher_rollout: int = 0

    def __str__(self) -> str:
        student, teacher = self.student + self.student_rollout, self.teacher + self.teacher_rollout
        return f"{student} N_s" + (f" + {teacher} N_t" if teacher else "")

    def per_token(self, student_parameters: int, teacher_parameters: int = 0) -> int:
        """Return the FLOPs per token, text of every step included.

        Raises:
            ValueError: the method runs a teacher and ``teacher_parameters`` is not positive.
        """
        teacher = self.teacher + self.teacher_rollout
        if teacher and teacher_parameters <= 0:
            raise ValueError(f"a method that costs {self} runs a teacher: teacher_parameters is {teacher_parameters}")
        return (self.student + self.student_rollout) * student_parameters + teacher * teacher_parameters


PRETRAINING = MethodCost()


def forward_flops(parameters: int, tokens: int) -> int:
    """Return the FLOPs of a forward pass over ``tokens``, 2 · N · tokens; also the cost of scoring a corpus."""
    return FORWARD_FLOPS_PER_PARAMETER * parameters * tokens


def training_flops(
    student_parameters: int, tokens: int, cost: MethodCost = PRETRAINING, teacher_parameters: int = 0
) -> int:
    """Return the FLOPs of training a student on ``tokens`` with a method, the teacher's forward passes counted.

    Raises:
        ValueError: the method runs a teacher and ``teacher_parameters`` is not positive.
    """
    return cost.per_token(student_parameters, teacher_parameters) * tokens


@dataclass(frozen=True)
class RunCost:
    """The cost of a run so far, from its steps and the number of sequences generated for it.

    Attributes:
        positions: b · s of a step's global batch.
        has_pretraining: whether a step trains on the dataset's batch beside generated text.
        pretraining_has_teacher: whether the loss on that batch has a distillation term.
    """

    method: MethodCost
    student_parameters: int
    teacher_parameters: int
    positions: int
    seq_length: int
    has_pretraining: bool = False
    pretraining_has_teacher: bool = False

    @property
    def flops_per_token(self) -> int:
        """FLOPs per position of a step, without generation."""
        cost = self.method.student * self.student_parameters + self.method.teacher * self.teacher_parameters
        if self.has_pretraining:
            cost += training_flops(self.student_parameters, 1)
        if self.pretraining_has_teacher:
            cost += forward_flops(self.teacher_parameters, 1)
        return cost

    def total(self, steps: int, student_texts: int, teacher_texts: int) -> int:
        """Return the FLOPs of ``steps`` for which student and teacher generated this many sequences."""
        cost = self.flops_per_token * self.positions * steps
        cost += forward_flops(self.student_parameters, self.seq_length * student_texts)
        cost += forward_flops(self.teacher_parameters, self.seq_length * teacher_texts)
        return cost


def matched_steps(plain_steps: int, student_parameters: int, teacher_parameters: int, cost: MethodCost) -> int:
    """Return the steps of a method that cost what ``plain_steps`` of plain pre-training cost, at the same batch.

    Plain pre-training costs 6 N_s per token; so Vanilla KD gets 3 N_s T / (3 N_s + N_t) steps and MiniLLM
    3 N_s T / (4 N_s + 2 N_t), rounded to the nearest whole step.

    Raises:
        ValueError: the method runs a teacher and ``teacher_parameters`` is not positive.
    """
    plain = training_flops(student_parameters, plain_steps)
    return round(plain / cost.per_token(student_parameters, teacher_parameters))


def difference_sampling_flops(
    teacher_parameters: int, reference_parameters: int, scored_tokens: int, reference_tokens: int
) -> int:
    """Return the offline FLOPs of difference sampling: two models score the corpus, the reference model is trained."""
    return (
        forward_flops(teacher_parameters, scored_tokens)
        + forward_flops(reference_parameters, scored_tokens)
        + training_flops(reference_parameters, reference_tokens)
    )
