"""A step that does not end: which rank holds it up, said before every process ends.

Every rank runs a thread that watches the loop's beats. Once one is overdue, each thread writes into the world's store
where its main thread stands; a rank that does not write is stopped or gone, one that does not wait for others holds
them up. The store has a connection of its own, so a main thread inside a collective does not block it.
"""

import json
import linecache
import os
import sys
import threading
import time
from collections import Counter
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

_PREFIX = "megatron_kd/hang/"
_GRACE_SECONDS = 15.0


class HangWatch:
    """A context in which a step, evaluation or save may take at most ``limit_seconds``; 0 means any time."""

    def __init__(self, limit_seconds: float):
        self._limit = limit_seconds
        self._doing, self._last = "start", time.monotonic()
        self._ended = threading.Event()

    def beat(self, doing: str) -> None:
        """The main thread has come to a new piece of work, e.g. ``step 12``."""
        self._doing, self._last = doing, time.monotonic()

    def __enter__(self) -> "HangWatch":
        if self._limit > 0 and dist.get_world_size() > 1:
            store = dist.distributed_c10d._get_default_store().clone()
            place = (dist.get_rank(), dist.get_world_size(), threading.get_ident())
            threading.Thread(target=self._watch, args=(store, *place), name="hang watch", daemon=True).start()
        self.beat("start")
        return self

    def __exit__(self, _: type | None, __: BaseException | None, ___: TracebackType | None) -> None:
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
            sys.stderr.write(
                f"train: {self._doing} has not ended after {self._limit:g} s (survival.hang_minutes): "
                f"{describe(states)}\n"
            )
            sys.stderr.flush()
        os._exit(1)


def where_it_stands(frame: FrameType | None) -> dict[str, Any]:
    """The innermost place outside torch.distributed, and whether the thread waits there for other ranks."""
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
    """Which ranks hold the others up.

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
