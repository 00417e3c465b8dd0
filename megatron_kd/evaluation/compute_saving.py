"""How much less compute a run needs for what another reached (figure 8 of the MiniPLM paper).

    python -m megatron_kd.evaluation.compute_saving BASELINE RUN …

The baseline's final held-out loss is looked up on each run's curve of held-out loss over training FLOPs, in log FLOPs
between the two evaluations around it. Training FLOPs count the teacher's forward passes; offline FLOPs are not in them.
"""

import math
import sys
from pathlib import Path
from typing import Sequence

from megatron_kd.errors import DataError, UserError
from megatron_kd.metrics.tracker import METRICS_NAME, read_metrics

Curve = list[tuple[float, float]]


def curve_of(folder: Path) -> Curve:
    """(training FLOPs, held-out loss) of a run's evaluations.

    Raises:
        DataError: not a run folder, or one without evaluations.
    """
    if not (folder / METRICS_NAME).is_file():
        raise DataError(f"{folder} is not a run folder: it has no {METRICS_NAME}")
    curve = [(row["train_flops"], row["eval_loss"]) for row in read_metrics(folder) if "eval_loss" in row]
    if not curve:
        raise DataError(f"{folder / METRICS_NAME} has no evaluation: set training.eval_interval and data.eval_path")
    return curve


def flops_to_reach(curve: Curve, loss: float) -> float | None:
    """FLOPs at which the curve first comes down to ``loss``; None where it never does."""
    before: tuple[float, float] | None = None
    for flops, value in curve:
        if value <= loss:
            if before is None or value == before[1]:
                return flops
            share = (before[1] - loss) / (before[1] - value)
            return math.exp(math.log(before[0]) + share * (math.log(flops) - math.log(before[0])))
        before = (flops, value)
    return None


def saving(baseline: Curve, run: Curve) -> float | None:
    """Baseline's FLOPs over the run's for the baseline's final loss; None where the run does not reach it."""
    flops, loss = baseline[-1]
    reached = flops_to_reach(run, loss)
    return None if reached is None else flops / reached


def main(arguments: Sequence[str]) -> int:
    """Print one line a run."""
    if len(arguments) < 2:
        sys.stderr.write("compute_saving: name a baseline and at least one run folder\n")
        return 2
    try:
        baseline = curve_of(Path(arguments[0]))
        for folder in arguments[1:]:
            factor = saving(baseline, curve_of(Path(folder)))
            text = "does not reach"
            if factor is not None:
                text = f"needs {1 / factor:.2f} of the FLOPs ({factor:.2f} x less) for"
            sys.stdout.write(f"{folder} {text} {arguments[0]}'s held-out loss {baseline[-1][1]:.4f}\n")
    except UserError as error:
        sys.stderr.write(f"compute_saving: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
