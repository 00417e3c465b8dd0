"""SIGTERM and SIGUSR1 (a scheduler's warning): noted for the next step's end, with a limit on how long that may take.

Python runs signal handlers between two of its own instructions, which a process that waits inside a collective does
not reach. So the limit is kept by a thread that the operating system's handler wakes through a pipe.
"""

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from megatron_kd.errors import EXIT_REQUEUE

WATCHED = (signal.SIGTERM, signal.SIGUSR1)


class SignalWatch:
    """A context in which the watched signals do not end the process at once.

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
        """The first watched signal that came, if one did."""
        return self._received

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
            return self
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        for number in WATCHED:
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
                if any(number in WATCHED for number in numbers):
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
        sys.stderr.write(
            f"train: {self._limit:g} s after the signal (survival.exit_within_seconds) the run has not ended: it ends "
            "now, the newest whole checkpoint counts\n"
        )
        sys.stderr.flush()
        os._exit(EXIT_REQUEUE)
