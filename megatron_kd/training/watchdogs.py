"""Threads that end a run which does not end by itself: after a scheduler's signal, or in a step that hangs.

:class:`StopSignals` notes SIGTERM and SIGUSR1 (a scheduler's warning) for the end of the step, and limits how long that
may take. Python runs signal handlers between two of its own instructions, which a process that waits inside a
collective does not reach. So the limit is kept by a thread that the operating system's handler wakes through a pipe.

:class:`HangWatchdog` names the rank that holds a step up before every process ends. Every rank has a thread that
watches the loop's beats. Once one is overdue, each thread writes into the world's store where its main thread stands; a
rank that does not write is stopped or gone, one that does not wait for others holds them up. The store has a connection
of its own, so a main thread inside a collective does not block it.
"""

import json
import linecache
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_kd.errors import EXIT_REQUEUE
from megatron_kd.logs import EVERY_RANK

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """A context in which a scheduler's signals do not end the process at once.

    Args:
        limit_seconds: the process ends with status 75 this long after the first signal, whatever it does.
    """

    def __init__(self, limit_seconds: float):
        self._limit = limit_seconds
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1
        self._ours: socket.socket | None = None
        self._theirs: socket.socket | None = None

    @property
    def received(self) -> signal.Signals | None:
        """The first signal that arrived; None before."""
        return self._received

    def agree(self, group: dist.ProcessGroup, device: torch.device, is_writing: bool = False) -> tuple[bool, bool]:
        """Return whether any rank has received a signal, and whether any is still writing a checkpoint.

        Collective over ``group``: the same answer on all of its ranks.
        """
        flags = torch.tensor([bool(self._received), is_writing], dtype=torch.int32, device=device)
        if group.size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
        stops, writing = flags.tolist()
        return bool(stops), bool(writing)

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
            return self
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        threading.Thread(target=self._limit_time, args=(self._ours,), name="signal limit", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours is None or self._theirs is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._theirs.close()  # the thread reads the end of the stream
        self._ours, self._theirs = None, None

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(number)

    def _limit_time(self, pipe: socket.socket) -> None:
        with pipe:
            while numbers := pipe.recv(16):
                if any(number in STOP_SIGNALS for number in numbers):
                    break
            else:
                return
            end = time.monotonic() + self._limit
            pipe.settimeout(0.2)
            while time.monotonic() < end:
                try:
                    if not pipe.recv(16):
                        return
                except TimeoutError:
                    continue
        logger.info(
            f"the run is still busy {self._limit:g} s after the signal (fault_tolerance.exit_within_seconds) and is "
            "ended now: the newest whole checkpoint counts",
            extra=EVERY_RANK,
        )
        os._exit(EXIT_REQUEUE)


@contextmanager
def ignored_stop_signals() -> Iterator[None]:
    """Ignore a scheduler's signals inside."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_PREFIX = "megatron_kd/hang/"
_GRACE_SECONDS = 15.0


class HangWatchdog:
    """A context in which a step, evaluation or save may take at most ``limit_seconds``; 0 sets no limit."""

    def __init__(self, limit_seconds: float):
        self._limit = limit_seconds
        self._doing, self._last = "start", time.monotonic()
        self._ended = threading.Event()

    def beat(self, doing: str) -> None:
        """Note that the main thread has begun a new piece of work, e.g. ``step 12``."""
        self._doing, self._last = doing, time.monotonic()

    def __enter__(self) -> "HangWatchdog":
        if self._limit > 0 and dist.get_world_size() > 1:
            # torch's type stubs lack Store.clone
            store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            place = (dist.get_rank(), dist.get_world_size(), threading.get_ident())
            threading.Thread(target=self._watch, args=(store, *place), name="hang watchdog", daemon=True).start()
        self.beat("start")
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self, store: dist.Store, rank: int, world_size: int, main_thread: int) -> None:
        while not self._ended.wait(min(5.0, self._limit / 10)):
            if time.monotonic() - self._last > self._limit:
                break
        else:
            return
        state = {"doing": self._doing, **where_it_stands(sys._current_frames()[main_thread])}
        store.set(f"{_PREFIX}{rank}", json.dumps(state))
        if self._ended.wait(min(_GRACE_SECONDS, self._limit / 2)):
            return
        states = {
            other: json.loads(store.get(key)) if store.check([key := f"{_PREFIX}{other}"]) else None
            for other in range(world_size)
        }
        if store.add(f"{_PREFIX}reported", 1) == 1:
            logger.info(
                f"{self._doing} has not ended after {self._limit:g} s (fault_tolerance.hang_minutes): "
                f"{describe(states)}",
                extra=EVERY_RANK,
            )
        os._exit(1)


def where_it_stands(frame: FrameType | None) -> dict[str, Any]:
    """Return the innermost place outside torch.distributed, and whether the thread waits there for other ranks."""
    waits = False
    while frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        if f"{os.sep}torch{os.sep}distributed{os.sep}" in file:
            waits = True
        else:
            waits = waits or ".wait(" in linecache.getline(file, line)
            if not file.endswith(f"torch{os.sep}utils{os.sep}_contextlib.py"):
                return {"where": f"{os.path.basename(file)}:{line} {frame.f_code.co_name}", "waits": waits}
        frame = frame.f_back
    return {"where": "outside Python", "waits": waits}


def describe(states: dict[int, dict[str, Any] | None]) -> str:
    """Say which ranks hold the others up.

    Args:
        states: rank -> what it wrote, None for one that wrote nothing.
    """
    silent = [rank for rank, state in states.items() if state is None]
    answered = {rank: state for rank, state in states.items() if state is not None}
    busy = [rank for rank, state in answered.items() if not state["waits"]]
    if not silent and not busy:
        usual = Counter(state["where"] for state in answered.values()).most_common(1)[0][0]
        busy = [rank for rank, state in answered.items() if state["where"] != usual] or list(answered)
    parts = [f"rank {rank} does not answer: its process is stopped, gone or cut off" for rank in silent]
    if not silent or len(busy) < len(answered):
        parts += [f"rank {rank} is at {answered[rank]['where']} ({answered[rank]['doing']})" for rank in busy]
    others = [rank for rank in answered if rank not in busy]
    if others:
        places = sorted({answered[rank]["where"] for rank in others})
        parts.append(f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))} wait at {', '.join(places)}")
    return "; ".join(parts)
