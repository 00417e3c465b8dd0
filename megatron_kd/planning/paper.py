"""Figures of the MiniPLM paper (arXiv 2410.17215), as printed and as its formulas give them.

The paper computes with rounded sizes (0.2B, 0.5B, 1.2B students, 1.8B teacher), which ``NOMINAL`` holds, so that a plan
can show the budget of the exact parameter count beside the paper's.
"""

from dataclasses import dataclass

from megatron_kd.costs.flops import forward_flops, matched_steps, training_flops
from megatron_kd.training.methods.method_table import METHODS

NOMINAL = {
    "qwen_104m": 104_000_000,
    "qwen_200m": 200_000_000,
    "qwen_300m": 300_000_000,
    "qwen_500m": 500_000_000,
    "qwen_1.2b": 1_200_000_000,
    "qwen_1.8b": 1_800_000_000,
}
BASELINE_STEPS = 100_000
TOKENS_PER_STEP = 524_288
CHINCHILLA_TOKENS_PER_STEP_RATIO = 20
"""The paper's "1T tokens" are 20 times its 100K steps of 524,288 tokens: 1.048576e12."""
PRINTED_STEPS = {
    "vanilla_kd": {"qwen_200m": 25_000, "qwen_500m": 45_000, "qwen_1.2b": 65_000},
    "minillm": {"qwen_200m": 15_000, "qwen_500m": 30_000, "qwen_1.2b": 40_000},
}
ONE_TRILLION_PARAMETERS = {"qwen_200m": 200_000_000, "qwen_500m": 500_000_000, "qwen_1.2b": 1_160_000_000}


@dataclass(frozen=True)
class PrintedSteps:
    """FLOP-matched steps of the paper's rounded sizes: by its formula, and as printed."""

    student: str
    method: str
    formula: int
    printed: int

    @property
    def deviation(self) -> float:
        """The printed number over the formula's, minus one."""
        return self.printed / self.formula - 1


def printed_steps(student: str, teacher: str, method: str) -> PrintedSteps | None:
    """Return the paper's row for this student, teacher and method; None where it has none."""
    printed = PRINTED_STEPS.get(method, {}).get(student)
    if printed is None or teacher != "qwen_1.8b":
        return None
    formula = matched_steps(BASELINE_STEPS, NOMINAL[student], NOMINAL[teacher], METHODS[method].cost)
    return PrintedSteps(student, method, formula, printed)


def one_trillion_flops(student: str) -> float | None:
    """Return C_1T, the FLOPs of plain pre-training on 1.048576e12 tokens, for the student called ``student``.

    N is the paper's (1.16B for its 1.2B model); None where the paper has no such student.
    """
    parameters = ONE_TRILLION_PARAMETERS.get(student)
    if parameters is None:
        return None
    return training_flops(parameters, CHINCHILLA_TOKENS_PER_STEP_RATIO * BASELINE_STEPS * TOKENS_PER_STEP)


@dataclass(frozen=True)
class OfflineReading:
    """One way to count the offline FLOPs, beside the figure that the paper prints."""

    counted: str
    flops: float
    printed: float


def offline_readings() -> list[OfflineReading]:
    """Return ways of counting that come near the paper's 2e20 (MiniPLM) and 9e18 (its proxy variant).

    The paper prints both figures without saying what they count.
    """
    return [
        OfflineReading(
            "teacher, 1.8B, forward over the 50B tokens that are kept",
            forward_flops(1_800_000_000, 50_000_000_000),
            2e20,
        ),
        OfflineReading(
            "teacher, 1.21B without embeddings, forward over 100B tokens",
            forward_flops(1_214_498_816, 100_000_000_000),
            2e20,
        ),
        OfflineReading("teacher, 1.8B, forward over 100B tokens", forward_flops(1_800_000_000, 100_000_000_000), 2e20),
        OfflineReading("proxy, 45M, forward over 100B tokens", forward_flops(45_000_000, 100_000_000_000), 9e18),
    ]
