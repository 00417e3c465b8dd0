"""Record of a run: ``metrics.jsonl`` (one object per step), a console line with an ETA, and other trackers.

A row has ``step`` and any figures; rows of training have ``loss``, rows of evaluations ``eval_loss``.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.errors import DataError
from megatron_kd.metrics.sinks import MetricsConfig, Sink, open_sinks

METRICS_NAME = "metrics.jsonl"
GIB = 2**30


class RunTracker:
    """Records the rows of one run; on ranks other than the main one it does nothing.

    Args:
        folder: the run folder.
        total_steps: steps of the whole run, for the progress bar.
        first_step: steps done before. Rows of an interrupted run beyond them are dropped.
        active: whether this rank records.
        description: text before the progress bar.
        config: which other trackers get the rows.
        run_config: the run's settings, for trackers that keep them.

    Raises:
        ConfigError: a tracker of ``config`` is not installed.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        first_step: int,
        active: bool,
        description: str,
        config: MetricsConfig | None = None,
        run_config: Mapping[str, Any] | None = None,
    ):
        self._file: TextIO | None = None
        self._bar: tqdm | None = None
        self._sinks: Sequence[Sink] = ()
        if not active:
            return
        path = folder / METRICS_NAME
        _drop_rows_beyond(path, first_step)
        self._sinks = open_sinks(config or MetricsConfig(), folder, first_step, run_config)
        self._file = open(path, "a", encoding="utf-8")
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc=description,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )

    def step(self, row: Mapping[str, Any]) -> None:
        """Record one training step."""
        if self._file is None or self._bar is None:
            return
        self._write(self._file, row)
        self._bar.set_postfix_str(console_line(row), refresh=False)
        self._bar.update(1)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Record an evaluation (``step``, ``eval_loss``, ``bits_per_byte``)."""
        if self._file is None or self._bar is None:
            return
        self._write(self._file, row)
        self._bar.write(
            f"step {row['step']}: held-out loss {row['eval_loss']:.4f} nats per token, "
            f"{row['bits_per_byte']:.4f} bits per byte",
            file=sys.stderr,
        )

    def flush(self) -> None:
        """Put all rows on the disk, before a checkpoint claims that their steps were done."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Put all rows on the disk, and close the file, the progress bar and the other trackers."""
        if self._file is not None and self._bar is not None:
            self.flush()
            self._file.close()
            self._bar.close()
            for sink in self._sinks:
                sink.close()

    def _write(self, file: TextIO, row: Mapping[str, Any]) -> None:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        for sink in self._sinks:
            sink.write(row)


def console_line(row: Mapping[str, Any]) -> str:
    """Return the figures of a row as one line for the progress bar; absent figures are left out."""
    parts = [f"loss {row['loss']:.4f}"]
    if row.get("kd_loss"):
        parts.append(f"lm {row['lm_loss']:.4f} kd {row['kd_loss']:.4f}")
    if "grad_norm" in row:
        parts.append(f"grad {row['grad_norm']:.2f}")
    if "learning_rate" in row:
        parts.append(f"lr {row['learning_rate']:.2e}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "tflops_per_second" in row:
        parts.append(f"{row['tflops_per_second']:.3g} TFLOP/s")
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    if "memory_bytes" in row:
        parts.append(f"{row['memory_bytes'] / GIB:.1f} GiB")
    return ", ".join(parts)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a run folder; a last line that a kill cut short is left out.

    Raises:
        DataError: the folder is not a run folder.
    """
    path = Path(folder) / METRICS_NAME
    if not path.is_file():
        raise DataError(f"{folder} is not a run folder: it has no {METRICS_NAME}")
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_evaluations(folder: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a run's evaluations, oldest first.

    Raises:
        DataError: the folder is not a run folder, or its run has not evaluated.
    """
    rows = [row for row in read_metrics(folder) if "eval_loss" in row]
    if not rows:
        raise DataError(
            f"{Path(folder) / METRICS_NAME} has no evaluation: set training.eval_interval and data.eval_path"
        )
    return rows


def _drop_rows_beyond(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path.parent) if row.get("step", 0) <= step] if step else []
    write_file(path, "".join(json.dumps(row) + "\n" for row in kept))
