"""Where a run's figures go: ``metrics.jsonl`` (one object a step), a console line with its ETA, and other trackers.

The console line of a step: loss, its terms, gradient norm, rate, speed, MFU, memory; tqdm adds step and ETA.

What this rank's device is capable of and has used: peak FLOP/s for MFU, memory.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Mapping, Sequence, TextIO

import psutil
import torch
from tqdm import tqdm

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.costs.gpus import peak_tflops_of
from megatron_kd.metrics.sinks import MetricsConfig, Sink, open_sinks

METRICS_NAME = "metrics.jsonl"


class RunTracker:
    """Writes the rows of one run; on ranks other than the main one it does nothing.

    Args:
        folder: the run folder.
        total_steps: for the bar.
        first_step: steps done before; rows beyond them (of an interrupted run) are dropped.
        active: whether this rank writes.
        description: shown before the bar.
        config: which other trackers get the rows.
        run_config: the run's settings, for trackers that keep them.
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
        self._write(row)
        self._bar.set_postfix_str(console_line(row), refresh=False)
        self._bar.update(1)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Record an evaluation (``step``, ``eval_loss``, ``bits_per_byte``)."""
        if self._file is None or self._bar is None:
            return
        self._write(row)
        self._bar.write(
            f"step {row['step']}: held-out loss {row['eval_loss']:.4f} nats a token, "
            f"{row['bits_per_byte']:.4f} bits a byte",
            file=sys.stderr,
        )

    def flush(self) -> None:
        """Put what was recorded on the disk (before a checkpoint says that the steps were done)."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the bar and close the file."""
        if self._file is not None and self._bar is not None:
            self.flush()
            self._file.close()
            self._bar.close()
            for sink in self._sinks:
                sink.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(row)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run folder; a last line that a kill cut short is left out."""
    rows = []
    for line in (Path(folder) / METRICS_NAME).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _drop_rows_beyond(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [row for row in read_metrics(path.parent) if row.get("step", 0) <= step] if step else []
    write_file(path, "".join(json.dumps(row) + "\n" for row in kept))


GIB = 2**30


def console_line(row: Mapping[str, Any]) -> str:
    """What stands behind the progress bar for a row of ``metrics.jsonl``; absent figures are left out."""
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


def peak_flops(device: torch.device, stated_tflops: float | None) -> float | None:
    """Dense peak FLOP/s of one device: what was stated, else what is known of this GPU, else None."""
    if stated_tflops is not None:
        return stated_tflops * 1e12
    if device.type != "cuda":
        return None
    known = peak_tflops_of(torch.cuda.get_device_name(device))
    return None if known is None else known * 1e12


class MemoryMeter:
    """Most bytes this rank has held: ``max_memory_allocated`` on CUDA, the resident set on a CPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._process = psutil.Process(os.getpid())

    def read(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._process.memory_info().rss
