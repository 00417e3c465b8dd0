"""Runs steps that depend on each other as processes, a few at a time, and remembers which are done.

A step is done when it has exited with 0 and its outputs exist. That is recorded in ``<state>/<name>.json``, with a key
made of its command, the text of its configuration files and the keys of the steps that it needs. A later run skips a
step with an unchanged key, and repeats those that changed and all that depend on them. An interrupted step with the
same key continues its own output if it can (``resumable``); otherwise the output is removed first.

Progress is one line: the share of the work done, an ETA, and each running step with its last loss.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TextIO

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.errors import EXIT_BAD_INPUT, UserError
from megatron_kd.metrics.tracker import METRICS_NAME

POLL_SECONDS = 0.2
STOP_SECONDS = 10
LOG_TAIL_LINES = 25
METRICS_TAIL_BYTES = 4096
SECONDS_BETWEEN_LINES = 20.0
STOPPING_SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Step:
    """A process to run.

    Attributes:
        name: unique; names the log and the state file.
        command: program and arguments.
        needs: names of the steps that must be done before.
        outputs: paths that it creates; they are removed before it runs again.
        configs: files whose text is part of the step's identity.
        seconds: estimated duration, for order and ETA only.
        metrics: run folder whose ``metrics.jsonl`` shows the progress, and the number of training steps.
        resumable: whether it continues its own unfinished output.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    configs: tuple[Path, ...] = ()
    seconds: float = 1.0
    metrics: tuple[Path, int] | None = None
    resumable: bool = False


class StepFailed(UserError):
    """A step that exited with an error; the message has the end of its log, or its last line for bad input.

    Attributes:
        status: the step's exit status.
    """

    def __init__(self, step: Step, status: int, log: Path):
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        self.status = status
        if status == EXIT_BAD_INPUT and tail:
            super().__init__(f"step '{step.name}' stopped: {tail[-1].strip()} (its log: {log})")
            return
        super().__init__(
            f"step '{step.name}' failed with exit status {status}. The end of {log}:\n"
            + "\n".join(f"    {line}" for line in tail)
            + f"\nIts command: {' '.join(step.command)}"
        )


@dataclass
class Schedule:
    """Steps that are done, running and waiting.

    Attributes:
        steps: all steps, each after those that it needs.
        done: finished steps by name, each with the seconds that it took, in an earlier run if it was skipped.
        skipped: names of the steps that an earlier run had done.
        running: running steps by name, each with its start on the monotonic clock.
    """

    steps: Sequence[Step]
    done: dict[str, float] = field(default_factory=dict)
    skipped: set[str] = field(default_factory=set)
    running: dict[str, float] = field(default_factory=dict)

    def next_step(self) -> Step | None:
        """Return the step to start next: among those that could start, the head of the longest chain of work."""
        ready = [
            step
            for step in self.steps
            if step.name not in self.done
            and step.name not in self.running
            and all(need in self.done for need in step.needs)
        ]
        return max(ready, key=lambda step: self._chain_seconds(step.name), default=None)

    def _chain_seconds(self, name: str) -> float:
        own = next(step.seconds for step in self.steps if step.name == name)
        return own + max((self._chain_seconds(step.name) for step in self.steps if name in step.needs), default=0.0)


class StepRunner:
    """Runs steps until all are done.

    Args:
        steps: all steps, each after those that it needs.
        state: folder for state files.
        logs: folder for the steps' output.
        processes: how many steps run at a time.
        environment: variables of the processes, added to this process's.
        on_progress: called with the schedule a few times per second.

    Raises:
        ValueError: a step comes twice, or before one that it needs.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        state: Path,
        logs: Path,
        processes: int,
        environment: Mapping[str, str] | None = None,
        on_progress: Callable[[Schedule], None] | None = None,
    ):
        _check_order(steps)
        self._state, self._logs, self._slots = state, logs, processes
        self._environment = {**os.environ, **(environment or {})}
        self._on_progress = on_progress or (lambda _: None)
        self._keys = step_keys(steps)
        self._processes: dict[str, subprocess.Popen] = {}
        self.schedule = Schedule(steps)

    def run(self) -> Schedule:
        """Run all steps and return the finished schedule.

        Raises:
            StepFailed: a step exited with an error; the others were stopped.
        """
        self._state.mkdir(parents=True, exist_ok=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            while len(self.schedule.done) < len(self.schedule.steps):
                self._start_ready()
                self._on_progress(self.schedule)
                if self._processes:
                    time.sleep(POLL_SECONDS)
                    self._collect_finished()
            self._on_progress(self.schedule)
        finally:
            self._stop_all()
        return self.schedule

    def _start_ready(self) -> None:
        while len(self._processes) < self._slots and (step := self.schedule.next_step()) is not None:
            record = self._record(step)
            if record.get("seconds") is not None and all(path.exists() for path in step.outputs):
                self.schedule.done[step.name] = record["seconds"]
                self.schedule.skipped.add(step.name)
                continue
            if not (record and step.resumable):
                _remove(step.outputs)
            self._write_record(step, None)
            with open(self._logs / f"{step.name}.log", "wb") as log, _delayed_signals():
                self._processes[step.name] = subprocess.Popen(
                    step.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self._environment
                )
            self.schedule.running[step.name] = time.monotonic()

    def _collect_finished(self) -> None:
        for step in self.schedule.steps:
            process = self._processes.get(step.name)
            if process is None or process.poll() is None:
                continue
            del self._processes[step.name]
            seconds = time.monotonic() - self.schedule.running.pop(step.name)
            missing = [str(path) for path in step.outputs if not path.exists()]
            log = self._logs / f"{step.name}.log"
            if process.returncode == 0 and missing:
                with open(log, "a", encoding="utf-8") as file:
                    file.write(f"\nexited with 0 but did not create {', '.join(missing)}\n")
            if process.returncode != 0 or missing:
                raise StepFailed(step, process.returncode, log)
            self._write_record(step, seconds)
            self.schedule.done[step.name] = seconds

    def _stop_all(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _record(self, step: Step) -> dict:
        """Read an earlier run's record of this step: {} if there is none, ``seconds`` None if it did not finish."""
        try:
            record = json.loads((self._state / f"{step.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return record if record.get("key") == self._keys[step.name] else {}

    def _write_record(self, step: Step, seconds: float | None) -> None:
        text = json.dumps({"key": self._keys[step.name], "seconds": seconds})
        write_file(self._state / f"{step.name}.json", text + "\n")


@contextmanager
def _delayed_signals() -> Iterator[None]:
    """Delay SIGINT and SIGTERM to the end of the block, so that a process started in it is known to the cleanup."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    handlers = {
        number: signal.signal(number, lambda *signaled: received.append(signaled)) for number in STOPPING_SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in received[:1]:
            handler = handlers[number]
            handler(number, frame) if callable(handler) else signal.raise_signal(number)


def step_keys(steps: Sequence[Step]) -> dict[str, str]:
    """Return a key per step: a hash of its command, its configuration files, and the keys of the steps it needs."""
    keys: dict[str, str] = {}
    for step in steps:
        parts = [
            *step.command,
            *(path.read_text(encoding="utf-8") for path in step.configs),
            *(keys[need] for need in step.needs),
        ]
        keys[step.name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return keys


def _check_order(steps: Sequence[Step]) -> None:
    known: set[str] = set()
    for step in steps:
        unknown = set(step.needs) - known
        if unknown or step.name in known:
            raise ValueError(f"step '{step.name}' comes twice, or before {sorted(unknown)}, which it needs")
        known.add(step.name)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class ProgressDisplay:
    """Shows a schedule: on a terminal as one line that is rewritten, elsewhere as a line every 20 seconds.

    Args:
        stream: where the text goes.
        width: columns of the terminal; None if the stream is not a terminal.
    """

    def __init__(self, stream: TextIO = sys.stdout, width: int | None = None):
        self._stream, self._width = stream, width
        self._started = self._last_line = time.monotonic()
        self._announced: set[str] = set()

    def __call__(self, schedule: Schedule) -> None:
        """Show the schedule as it is now."""
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
        """Erase the status line."""
        if self._width is not None:
            self._stream.write("\r" + " " * (self._width - 1) + "\r")
            self._stream.flush()

    def status(self, schedule: Schedule) -> str:
        """Return the line: steps done, share of the work, ETA, and each running step with its last loss."""
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
    """Return a step's share of work done: by the metrics of a training step, by the clock (at most 0.95) for others."""
    if step.name in schedule.done:
        return 1.0
    if step.name not in schedule.running:
        return 0.0
    if step.metrics is not None:
        row = last_row(step.metrics[0])
        return min(1.0, row["step"] / step.metrics[1]) if row else 0.0
    return min(0.95, (time.monotonic() - schedule.running[step.name]) / step.seconds)


def describe(step: Step) -> str:
    """Describe a running step: ``teacher 340/600 loss 4.31``."""
    if step.metrics is None:
        return step.name
    row = last_row(step.metrics[0])
    return f"{step.name} {row['step']}/{step.metrics[1]} loss {row['loss']:.2f}" if row else step.name


def last_row(run: Path) -> dict | None:
    """Return the last training row of a run folder, read from the end of the file; None if there is none yet."""
    try:
        with open(run / METRICS_NAME, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - METRICS_TAIL_BYTES))
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
