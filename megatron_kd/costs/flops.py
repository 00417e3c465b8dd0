"""What training costs in floating-point operations, and how many steps make two methods cost the same.

The convention is the MiniPLM paper's (arXiv 2410.17215): a forward pass costs 2N per token and a backward pass twice
that, N being **all parameters of the model, tied weights once** (:attr:`ModelArchitecture.parameters`). Attention's
quadratic term is left out. Every function takes N, so that a caller may count parameters in another way.

    method      FLOPs per token    what is counted
    none        6 N_s              student forward and backward
    vanilla_kd  6 N_s + 2 N_t      and the teacher's forward
    minillm     8 N_s + 4 N_t      and the student's forward for sampling, the teacher's two
    gkd         6 N_s + 2 N_t      and 2 N of whoever writes, in the steps on generated text
    distillm    6 N_s + 2 N_t      and 2 N_s in the steps for which the student writes anew
    seqkd       6 N_s              the teacher writes the corpus once: offline
    pre-training loss beside generated text   6 N_s, and 2 N_t with a distillation term

Generating costs 2N per token, prompt included: with a key-value cache every token passes the model once.

Work done once before training (scoring a corpus, training the reference model) is *offline*: it is reported beside the
training cost and not matched, because every student trained on the result shares it.
"""

from dataclasses import dataclass
from typing import Literal

Method = Literal["none", "vanilla_kd", "minillm", "gkd", "distillm"]

FORWARD_FLOPS_PER_PARAMETER = 2
TRAINING_FLOPS_PER_PARAMETER = 6
# (student, teacher) operations per parameter and token.
METHOD_FLOPS: dict[str, tuple[int, int]] = {"none": (6, 0), "vanilla_kd": (6, 2), "minillm": (8, 4), "gkd": (6, 2),
                                             "distillm": (6, 2)}  # fmt: skip


def formula_text(method: str) -> str:
    """Return the FLOPs per token as text: ``6 N_s + 2 N_t``."""
    student, teacher = METHOD_FLOPS[method]
    return f"{student} N_s" + (f" + {teacher} N_t" if teacher else "")


def forward_flops(parameters: int, tokens: int) -> int:
    """Return the FLOPs of a forward pass over ``tokens``, 2 · N · tokens; also the cost of scoring a corpus."""
    return FORWARD_FLOPS_PER_PARAMETER * parameters * tokens


def training_flops(student_parameters: int, tokens: int, method: str = "none", teacher_parameters: int = 0) -> int:
    """Return the FLOPs of training a student on ``tokens`` with ``method``, the teacher's forward passes counted.

    Raises:
        ValueError: the method is unknown, or it needs a teacher and ``teacher_parameters`` is not positive.
    """
    student_factor, teacher_factor = _factors(method, teacher_parameters)
    return (student_factor * student_parameters + teacher_factor * teacher_parameters) * tokens


@dataclass(frozen=True)
class RunCost:
    """The cost of a run so far, from its steps and the number of sequences generated for it.

    Attributes:
        positions: b · s of a step's global batch.
        has_pretraining: whether a step trains on the dataset's batch beside generated text.
        pretraining_has_teacher: whether the loss on that batch has a distillation term.
    """

    method: Method
    student_parameters: int
    teacher_parameters: int
    positions: int
    seq_length: int
    has_pretraining: bool = False
    pretraining_has_teacher: bool = False

    @property
    def flops_per_token(self) -> int:
        """FLOPs per position of a step, without generation."""
        cost = training_flops(self.student_parameters, 1, self.method, self.teacher_parameters)
        if self.method == "minillm":  # its formula includes generation: one forward pass of either model
            cost -= forward_flops(self.student_parameters + self.teacher_parameters, 1)
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


def matched_steps(plain_steps: int, student_parameters: int, teacher_parameters: int, method: str) -> int:
    """Return the steps of ``method`` that cost what ``plain_steps`` of plain pre-training cost, at the same batch.

    Plain pre-training costs 6 N_s per token; so Vanilla KD gets 3 N_s T / (3 N_s + N_t) steps and MiniLLM
    3 N_s T / (4 N_s + 2 N_t), rounded to the nearest whole step.

    Raises:
        ValueError: the method is unknown, or it needs a teacher and ``teacher_parameters`` is not positive.
    """
    student_factor, teacher_factor = _factors(method, teacher_parameters)
    plain = TRAINING_FLOPS_PER_PARAMETER * student_parameters * plain_steps
    return round(plain / (student_factor * student_parameters + teacher_factor * teacher_parameters))


def difference_sampling_flops(
    teacher_parameters: int, reference_parameters: int, scored_tokens: int, reference_tokens: int
) -> int:
    """Return the offline FLOPs of difference sampling: two models score the corpus, the reference model is trained."""
    return (
        forward_flops(teacher_parameters, scored_tokens)
        + forward_flops(reference_parameters, scored_tokens)
        + training_flops(reference_parameters, reference_tokens)
    )


def _factors(method: str, teacher_parameters: int) -> tuple[int, int]:
    if method not in METHOD_FLOPS:
        raise ValueError(f"method '{method}' has no cost formula; choose one of {', '.join(METHOD_FLOPS)}")
    student_factor, teacher_factor = METHOD_FLOPS[method]
    if teacher_factor and teacher_parameters <= 0:
        raise ValueError(f"method '{method}' runs a teacher: teacher_parameters is {teacher_parameters}")
    return student_factor, teacher_factor
