"""Worker processes that form a gloo world, started once and given functions to run.

    with Ranks(4) as ranks:
        results = ranks.run(function, argument, keyword=...)   # list by rank

``function`` must be importable by name (defined at the top level of a module) and is called on every rank as
``function(*arguments, **keywords)`` with ``torch.distributed`` initialised; its result must be picklable (tensors are
sent as they are, by value). A rank that raises makes ``run`` raise :class:`RankError` with that rank's traceback; one
that does not answer in time, or dies, does too. In both cases the world is ended: the other ranks may be waiting
inside a collective. The next ``run`` starts a fresh world.

``shared_ranks(n)`` keeps one world of each size for the whole test session.
"""

import atexit
import io
import os
import pickle
import sys
import tempfile
import time
import traceback
import uuid
from pathlib import Path
from typing import Any, Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_kd.logs import start_logging

DEFAULT_TIMEOUT = 120.0
REPOSITORY = Path(__file__).resolve().parents[2]


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time."""


class Ranks:
    """``world_size`` persistent worker processes with one gloo world."""

    def __init__(self, world_size: int, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.world_size = world_size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float | None = None, **keywords: Any) -> list:
        """``function(*arguments, **keywords)`` on every rank; the results by rank."""
        if not self._processes:
            self._start()
        request = pickle.dumps((function, _to_bytes((arguments, keywords))))
        try:
            for pipe in self._pipes:
                pipe.send_bytes(request)
            return self._collect(time.monotonic() + (timeout or self.timeout), function.__name__)
        except (RankError, OSError):
            self.close(kill=True)
            raise

    def new_store(self) -> str:
        """A path for a ``file://`` store that lasts as long as these workers: each new group comes back to it."""
        if self._folder is None:
            self._start()
        return str(Path(self._folder.name) / uuid.uuid4().hex)

    def close(self, kill: bool = False) -> None:
        """End the workers: politely, or at once."""
        for pipe in self._pipes:
            try:
                if not kill:
                    pipe.send_bytes(b"")
            except OSError:
                pass
        for process in self._processes:
            if not kill:
                process.join(timeout=10)
            if process.is_alive():
                process.kill()
            process.join(timeout=10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True)
        store = self.new_store()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.world_size, store, theirs, list(sys.path)))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self, deadline: float, name: str) -> list:
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            if time.monotonic() > deadline:
                silent = sorted(set(range(self.world_size)) - set(results))
                raise RankError(f"{name}: no answer from ranks {silent} of {self.world_size} in time")
            for rank, (pipe, process) in enumerate(zip(self._pipes, self._processes)):
                if rank in results:
                    continue
                if pipe.poll(0.002):
                    try:
                        succeeded, payload = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        raise RankError(f"{name}: rank {rank} died with exit code {_exit_code(process)}") from None
                    if not succeeded:
                        raise RankError(f"{name}: rank {rank} of {self.world_size} raised\n{payload}")
                    results[rank] = _from_bytes(payload)
                elif not process.is_alive() and not pipe.poll(0):
                    raise RankError(f"{name}: rank {rank} died with exit code {process.exitcode}")
        return [results[rank] for rank in range(self.world_size)]


_shared: dict[int, Ranks] = {}


def shared_ranks(world_size: int) -> Ranks:
    """The session's world of this size, started at its first use."""
    if world_size not in _shared:
        _shared[world_size] = Ranks(world_size)
    return _shared[world_size]


@atexit.register
def close_shared_ranks() -> None:
    """End all shared worlds."""
    for ranks in _shared.values():
        ranks.close()
    _shared.clear()


def _work(rank: int, world_size: int, store: str, pipe: Any, path: list[str]) -> None:
    sys.path[:] = path if str(REPOSITORY) in path else [str(REPOSITORY), *path]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    start_logging("ranks")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            break
        if not request:
            break
        try:
            function, payload = pickle.loads(request)
            arguments, keywords = _from_bytes(payload)
            answer = (True, _to_bytes(function(*arguments, **keywords)))
        except BaseException:
            answer = (False, traceback.format_exc())
        _end_groups()
        pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


def _end_groups() -> None:
    """End all groups but the world: each has threads of its own that wake a hundred times a second."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _from_bytes(payload: bytes) -> Any:
    return torch.load(io.BytesIO(payload), weights_only=False)


def _exit_code(process: Any) -> int | None:
    process.join(timeout=5)
    return process.exitcode
