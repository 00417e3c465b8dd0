"""The keys of the methods that train on generated text, below ``distillation.``; defaults are the released codes'."""

from dataclasses import dataclass
from typing import Iterator, Literal


@dataclass(frozen=True)
class GKDConfig:
    """``distillation.gkd``: Generalized Knowledge Distillation (arXiv 2306.13649)."""

    student_fraction: float = 0.5
    """λ: the probability that a step trains on the student's own text."""
    seq_kd: bool = False
    """The other steps train on the teacher's text instead of the dataset's."""

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if not 0 <= self.student_fraction <= 1:
            yield f"'distillation.gkd.student_fraction' must be between 0 and 1, not {self.student_fraction}"


@dataclass(frozen=True)
class DistiLLMConfig:
    """``distillation.distillm``: DistiLLM (arXiv 2402.03898)."""

    initial_threshold: float = 0.0
    """φ at the start: the probability that a step trains on the student's text, new or from the buffer."""
    threshold_step: float = 0.1
    """What is added to φ when the held-out loss has risen."""
    loss_margin: float = 0.1
    """How far the held-out loss must rise for that, nats."""
    replay_schedule: Literal["decreasing", "constant", "increasing"] = "decreasing"
    """How the probability of new text goes over the run: φ (1 - step / steps), φ / 2, φ step / steps."""
    replay_capacity: int = 1000
    """Sequences of the whole run, first in first out."""

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        for name in ("initial_threshold", "threshold_step"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"'distillation.distillm.{name}' must be between 0 and 1, not {getattr(self, name)}"
        if self.replay_capacity < 1:
            yield f"'distillation.distillm.replay_capacity' must be at least 1, not {self.replay_capacity}"


@dataclass(frozen=True)
class MiniLLMConfig:
    """``distillation.minillm``: MiniLLM (arXiv 2306.08543)."""

    variant: Literal["paper", "released"] = "paper"
    """``released``: as the authors' code, which differs (docs/methods.md)."""
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
    """How many steps in a row train on the same rollouts (the paper's: 4); each weighs by the policy of then."""
    single_step: bool = True
    """Take the expectation over the next token exactly (the reverse KL of its distribution)."""
    reward_scaling: float = 0.5
    """``released``: rewards are divided by it."""
    reward_clip: float = 100.0
    """``released``: and then clipped to this."""
    discount: float = 0.95
    """``released``: γ."""

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
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
