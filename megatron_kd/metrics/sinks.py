"""TensorBoard and Weights & Biases as places for a run's rows; both get the same names as ``metrics.jsonl`` has.

The ``metrics.*`` keys: where a run's figures go besides ``metrics.jsonl`` and the console, and which cost extra.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Literal, Mapping, Protocol

from megatron_kd.errors import ConfigError

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


NOT_PLOTTED = ("step",)


class Sink(Protocol):
    """Takes rows and is closed once."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Record one row; ``row["step"]`` is its place."""

    def close(self) -> None:
        """Put everything on the disk."""


def open_sinks(
    config: MetricsConfig, folder: Path, first_step: int, run_config: Mapping[str, Any] | None = None
) -> list[Sink]:
    """The sinks that ``metrics.report_to`` names.

    Raises:
        ConfigError: the package of one is not installed.
    """
    sinks: list[Sink] = []
    for name in config.report_to:
        if name == "tensorboard":
            sinks.append(TensorBoardSink(folder / "tensorboard", first_step))
        else:
            sinks.append(WandbSink(config, folder, name == "wandb_offline", run_config or {}))
    return sinks


class TensorBoardSink:
    """Event files in the run folder; rows of an interrupted run beyond ``first_step`` are purged from view."""

    def __init__(self, folder: Path, first_step: int):
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import FileWriter
        except ImportError:
            raise ConfigError(
                "metrics.report_to has tensorboard, which is not installed: pip install tensorboard"
            ) from None
        self._summary = Summary
        self._writer = FileWriter(str(folder))
        # A reader drops what an interrupted run wrote from this step on.
        self._writer.add_event(Event(step=first_step + 1, file_version="brain.Event:2"))
        self._writer.add_event(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, row: Mapping[str, Any]) -> None:
        """One scalar a figure, all of a row in one event."""
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name not in NOT_PLOTTED and value is not None
        ]
        self._writer.add_summary(self._summary(value=values), row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink:
    """A W&B run, named after the run folder, resumed under the same id; offline it lies in the run folder."""

    def __init__(self, config: MetricsConfig, folder: Path, offline: bool, run_config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ConfigError("metrics.report_to has wandb, which is not installed: pip install wandb") from None
        name = config.run_name or folder.resolve().name
        self._run = wandb.init(
            project=config.wandb_project,
            name=name,
            id=_run_id(folder),
            resume=None if offline else "allow",
            dir=str(folder),
            mode="offline" if offline else "online",
            config=dict(run_config),
            settings=wandb.Settings(silent=True),
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """One row at its step."""
        self._run.log(
            {name: value for name, value in row.items() if name not in NOT_PLOTTED and value is not None},
            step=int(row["step"]),
        )

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    """The same for every start in this folder, so that a resumed job goes on with the same run."""
    path = folder / "wandb_id"
    if not path.exists():
        import uuid

        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
