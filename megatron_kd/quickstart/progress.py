"""One line of progress over all steps: share done, ETA, and what the running ones are at."""

import json
import sys
import time
from pathlib import Path
from typing import TextIO

from megatron_kd.metrics.tracker import METRICS_NAME
from megatron_kd.quickstart.steps import Schedule, Step

TAIL_BYTES = 4096
SECONDS_BETWEEN_LINES = 20.0


class ProgressDisplay:
    """Shows a schedule; on a terminal it rewrites one line, elsewhere it adds one now and then.

    Args:
        stream: where to.
        width: columns of the terminal; None means that the stream is none.
    """

    def __init__(self, stream: TextIO = sys.stdout, width: int | None = None):
        self._stream, self._width = stream, width
        self._started = self._last_line = time.monotonic()
        self._announced: set[str] = set()

    def __call__(self, schedule: Schedule) -> None:
        """Show the present state."""
        for name in schedule.done:
            if name not in self._announced:
                self._announced.add(name)
                how = "done before" if name in schedule.skipped else f"{schedule.done[name]:.0f} s"
                self._write_line(f"  {name}: {how}")
        now = time.monotonic()
        if self._width is not None:
            text = self.status(schedule)[: self._width - 1]
            self._stream.write(f"\r{text:<{self._width - 1}}")
            self._stream.flush()
        elif now - self._last_line >= SECONDS_BETWEEN_LINES and schedule.running:
            self._write_line(self.status(schedule))

    def finish(self) -> None:
        """Leave the status line."""
        if self._width is not None:
            self._stream.write("\r" + " " * (self._width - 1) + "\r")
            self._stream.flush()

    def status(self, schedule: Schedule) -> str:
        """The line: steps done, share of the work, ETA, and each running step with its last loss."""
        total = sum(step.seconds for step in schedule.steps)
        before = sum(step.seconds for step in schedule.steps if step.name in schedule.skipped)
        worked = sum(step.seconds * share_done(step, schedule) for step in schedule.steps) - before
        elapsed = time.monotonic() - self._started
        left = elapsed * (total - before - worked) / worked if worked > 0 else None
        eta = f"{int(left) // 60}:{int(left) % 60:02d} left" if left is not None else "…"
        running = " | ".join(describe(step) for step in schedule.steps if step.name in schedule.running)
        share = (before + worked) / total
        return f"[{len(schedule.done)}/{len(schedule.steps)}] {share:4.0%} {eta} | {running}"

    def _write_line(self, text: str) -> None:
        self._last_line = time.monotonic()
        end = " " * max(0, (self._width or 0) - 1 - len(text))
        self._stream.write(f"\r{text}{end}\n" if self._width is not None else f"{text}\n")
        self._stream.flush()


def share_done(step: Step, schedule: Schedule) -> float:
    """Between 0 and 1: from the metrics of a training step, from the clock for others (never more than 0.95)."""
    if step.name in schedule.done:
        return 1.0
    if step.name not in schedule.running:
        return 0.0
    if step.metrics is not None:
        row = last_row(step.metrics[0])
        return min(1.0, row["step"] / step.metrics[1]) if row else 0.0
    return min(0.95, (time.monotonic() - schedule.running[step.name]) / step.seconds)


def describe(step: Step) -> str:
    """A running step in a few words: ``teacher 340/600 loss 4.31``."""
    if step.metrics is None:
        return step.name
    row = last_row(step.metrics[0])
    return f"{step.name} {row['step']}/{step.metrics[1]} loss {row['loss']:.2f}" if row else step.name


def last_row(run: Path) -> dict | None:
    """The last training row of a run folder's metrics, read from the end of the file; None if there is none yet."""
    try:
        with open(run / METRICS_NAME, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "loss" in row:
            return row
    return None
