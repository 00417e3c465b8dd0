"""The ``metrics.*`` keys: where a run's figures go besides ``metrics.jsonl`` and the console, and which cost extra."""

from dataclasses import dataclass
from typing import Iterator, Literal

Sink = Literal["tensorboard", "wandb", "wandb_offline"]


@dataclass(frozen=True)
class MetricsConfig:
    """One switch for every tracker."""

    report_to: tuple[Sink, ...] = ()
    """``tensorboard`` (into the run folder), ``wandb``, ``wandb_offline`` (into the run folder, to be synced later)."""
    wandb_project: str = "megatron-kd"
    run_name: str | None = None
    """None means the run folder's name."""
    peak_tflops: float | None = None
    """Dense peak of one device, for MFU; None means what is known of this GPU, and no MFU where nothing is."""

    kd_lm_gradient_ratio_interval: int | None = None
    """Every so many steps the norm of the distillation term's gradient over that of the LM term's, weights included, is
    logged as ``kd_lm_gradient_ratio``. Such a step has a second pass of the student, and keeps another fp32 gradient,
    split like the optimizer's state. None measures nothing."""

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if "wandb" in self.report_to and "wandb_offline" in self.report_to:
            yield "'metrics.report_to' has both wandb and wandb_offline: choose one"
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            yield f"'metrics.peak_tflops' must be above 0, not {self.peak_tflops}"
        interval = self.kd_lm_gradient_ratio_interval
        if interval is not None and interval < 1:
            yield f"'metrics.kd_lm_gradient_ratio_interval' must be at least 1, not {interval}"
