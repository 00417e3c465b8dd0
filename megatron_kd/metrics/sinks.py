"""The ``metrics.*`` keys, and the trackers they name: TensorBoard and Weights & Biases.

Both get the rows of ``metrics.jsonl``, under the same names.
"""

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_kd.errors import ConfigError

SinkName = Literal["tensorboard", "wandb", "wandb_offline"]
NOT_PLOTTED = ("step",)


@dataclass(frozen=True)
class MetricsConfig:
    """The ``metrics.*`` keys: where figures go besides ``metrics.jsonl`` and the console, and those that cost extra."""

    report_to: tuple[SinkName, ...] = ()
    """``tensorboard`` (into the run folder), ``wandb``, ``wandb_offline`` (into the run folder, to be synced later)."""
    wandb_project: str = "megatron-kd"
    run_name: str | None = None
    """Name of the run in W&B; None for the run folder's name."""
    peak_tflops: float | None = None
    """Dense peak of one device, for MFU; None for the known peak of this GPU. Without either no MFU is reported."""

    kd_lm_gradient_ratio_interval: int | None = None
    """Log ``kd_lm_gradient_ratio`` every so many steps: the norm of the distillation term's gradient over that of the
    LM term's, weights included. Such a step runs a second pass of the student and holds another fp32 gradient, sharded
    like the optimizer's state. None: never."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if "wandb" in self.report_to and "wandb_offline" in self.report_to:
            yield "'metrics.report_to' has both wandb and wandb_offline: choose one"
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            yield f"'metrics.peak_tflops' must be above 0, not {self.peak_tflops}"
        interval = self.kd_lm_gradient_ratio_interval
        if interval is not None and interval < 1:
            yield f"'metrics.kd_lm_gradient_ratio_interval' must be at least 1, not {interval}"


class Sink(Protocol):
    """A tracker: takes rows, and is closed once."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Record one row at ``row["step"]``."""

    def close(self) -> None:
        """Put everything on the disk."""


def open_sinks(
    config: MetricsConfig, folder: Path, first_step: int, run_config: Mapping[str, Any] | None = None
) -> list[Sink]:
    """Open the trackers that ``metrics.report_to`` names.

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
    """Event files in the run folder; rows that an interrupted run wrote beyond ``first_step`` are hidden from view."""

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
        # These two events make a reader drop what an interrupted run wrote from this step on.
        self._writer.add_event(Event(step=first_step + 1, file_version="brain.Event:2"))
        self._writer.add_event(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, row: Mapping[str, Any]) -> None:
        """Record a row as one event with a scalar for each figure."""
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name not in NOT_PLOTTED and value is not None
        ]
        self._writer.add_summary(self._summary(value=values), row["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """A W&B run, named after the run folder and resumed under the same id; offline it is kept in the run folder."""

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
        """Record a row at its step."""
        self._run.log(
            {name: value for name, value in row.items() if name not in NOT_PLOTTED and value is not None},
            step=int(row["step"]),
        )

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    """Return the W&B id of a run folder, made at its first start, so that a resumed job continues the same W&B run."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
