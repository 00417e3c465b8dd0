"""Compute that a run saves: its FLOPs for the loss that another reached (figure 8 of the MiniPLM paper).

    python -m megatron_kd.evaluation.compute_saving BASELINE RUN …

The baseline's final held-out loss is looked up on each run's curve of held-out loss over training FLOPs, interpolated
in log FLOPs between the two evaluations around it. Training FLOPs include the teacher's forward passes, but no offline
FLOPs.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_kd.errors import EXIT_BAD_INPUT, ConfigError, UserError
from megatron_kd.metrics.tracker import read_evaluations

Curve = list[tuple[float, float]]


def read_curve(folder: Path) -> Curve:
    """Read (training FLOPs, held-out loss) of a run's evaluations.

    Raises:
        DataError: the folder is not a run folder, or its run has not evaluated.
    """
    return [(row["train_flops"], row["eval_loss"]) for row in read_evaluations(folder)]


def flops_to_reach(curve: Curve, loss: float) -> float | None:
    """Return the FLOPs at which the curve first comes down to ``loss``; None if it never does."""
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
    """Return the baseline's FLOPs over the run's for the baseline's final loss; None if the run does not reach it."""
    flops, loss = baseline[-1]
    reached = flops_to_reach(run, loss)
    return None if reached is None else flops / reached


def main(arguments: Sequence[str]) -> int:
    """Print one line per run and return the exit status."""
    try:
        if len(arguments) < 2:
            raise ConfigError("name a baseline and at least one run folder")
        baseline = read_curve(Path(arguments[0]))
        for folder in arguments[1:]:
            factor = saving(baseline, read_curve(Path(folder)))
            text = "does not reach"
            if factor is not None:
                text = f"needs {1 / factor:.2f} of the FLOPs ({factor:.2f} x less) for"
            sys.stdout.write(f"{folder} {text} {arguments[0]}'s held-out loss {baseline[-1][1]:.4f}\n")
    except UserError as error:
        sys.stderr.write(f"compute_saving: {error}\n")
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
