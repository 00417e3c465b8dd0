"""Start and end of the distributed world: device, backend, rank. One process without torchrun is a world of one.

For a remote teacher one torchrun world is split into two: the student's ranks and, behind them, the teacher's. Each has
a default process group of its own, so that whatever is collective over "the world" (checkpoints, Megatron-Core's
optimizer, agreement on failures) stays inside one of them. A third group, the bridge, spans all ranks and carries only
what the teacher sends; orders go through the store.
"""

import os
import random
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Iterator, Literal

import numpy
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_kd.errors import LayoutError, UserError, disk_full
from megatron_kd.parallel.coordination import another_rank_failed, first_to_fail
from megatron_kd.parallel.liveness import Liveness
from megatron_kd.parallel.mcore_patches import cpu_backend

Role = Literal["student", "teacher"]
BRIDGE_TIMEOUT = timedelta(days=7)  # a student may evaluate or save for long; liveness.py notices dead ranks


@dataclass(frozen=True)
class SplitWorld:
    """Place of a process in the split world.

    Attributes:
        role: of this rank.
        rank: in the whole world; the student's ranks come first.
        num_students: ranks of the student.
        num_teachers: ranks of the teacher.
        store: shared by all ranks.
        bridge: spans the whole world; it is not registered with torch.distributed, its own ``send`` and ``recv`` are
            used.
    """

    role: Role
    rank: int
    num_students: int
    num_teachers: int
    store: dist.Store
    bridge: dist.ProcessGroup

    @property
    def world_size(self) -> int:
        """Number of ranks of both."""
        return self.num_students + self.num_teachers


def describe_rank(rank: int, *, num_students: int, num_teachers: int) -> str:
    """Describe a rank for messages, as ``rank 5 (teacher rank 1 of 2)``."""
    if rank < num_students:
        return f"rank {rank} (student rank {rank} of {num_students})"
    return f"rank {rank} (teacher rank {rank - num_students} of {num_teachers})"


def join_split_world(num_teachers: int, device: torch.device, timeout: timedelta) -> SplitWorld:
    """Join the world of torchrun's environment variables, as one of the student's or the teacher's ranks.

    Raises:
        LayoutError: the world has no rank left for the student.
    """
    store, rank, world_size = _rendezvous(timeout)
    num_students = world_size - num_teachers
    if num_students < 1:
        raise LayoutError(
            f"teacher.num_ranks {num_teachers} of {world_size} ranks leaves none for the student: start more ranks"
        )
    on_cuda = device.type == "cuda"
    role: Role = "student" if rank < num_students else "teacher"
    backend: Any = dist.ProcessGroupNCCL if on_cuda else dist.ProcessGroupGloo
    bridge: dist.ProcessGroup = backend(dist.PrefixStore("bridge", store), rank, world_size, BRIDGE_TIMEOUT)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=dist.PrefixStore(role, store),
        rank=rank if role == "student" else rank - num_students,
        world_size=num_students if role == "student" else num_teachers,
        timeout=timeout,
        device_id=device if on_cuda else None,
    )
    return SplitWorld(role, rank, num_students, num_teachers, store, bridge)


def _rendezvous(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Return store, rank and world size of torchrun's world.

    torchrun's store outlives a restart, so each attempt has its own part of it: it would otherwise find the addresses,
    orders and failures of the ranks that died.
    """
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt_{attempt}", store), rank, world_size


@dataclass(frozen=True)
class Runtime:
    """The device that this process computes on, and its place in the world.

    Attributes:
        device: this rank's.
        rank: in the world, or in this rank's part of a split one.
        world_size: likewise.
        split: the split world; None where there is one world.
    """

    device: torch.device
    rank: int
    world_size: int
    split: SplitWorld | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0 and not self.is_teacher

    @property
    def is_teacher(self) -> bool:
        """Whether this is one of a remote teacher's ranks."""
        return self.split is not None and self.split.role == "teacher"


@contextmanager
def distributed_runtime(timeout_minutes: float = 30.0, teacher_ranks: int = 0) -> Iterator[Runtime]:
    """Join the torchrun world (NCCL on CUDA, gloo on CPU) or make a world of one; leave it at the end.

    A world that is initialised already (a test's) is used as it is and left standing. Of the ranks that stop on bad
    input the first is marked to report it.

    Args:
        timeout_minutes: how long a collective may wait.
        teacher_ranks: how many ranks, the last ones, are a world of their own, for a remote teacher. The death of any
            rank of a split world ends all.

    Raises:
        LayoutError: teacher ranks were asked for outside torchrun, or leave none for the student.
    """
    device = _choose_device()
    timeout = timedelta(minutes=timeout_minutes)
    if teacher_ranks:
        with _split_runtime(device, timeout, teacher_ranks) as runtime:
            yield runtime
        return
    owns_world = not dist.is_initialized()
    if owns_world:
        _join_world(device, timeout)
    try:
        with _one_reports():
            yield Runtime(device=device, rank=dist.get_rank(), world_size=dist.get_world_size())
    finally:
        if owns_world:
            dist.destroy_process_group()


@contextmanager
def _split_runtime(device: torch.device, timeout: timedelta, teacher_ranks: int) -> Iterator[Runtime]:
    if dist.is_initialized() or "RANK" not in os.environ:
        raise LayoutError(f"a teacher on {teacher_ranks} ranks of its own needs more ranks: start it with torchrun")
    split = join_split_world(teacher_ranks, device, timeout)
    # Liveness' thread may outlive all else, and destroying a process group needs the interpreter: it holds no bridge.
    describe = partial(describe_rank, num_students=split.num_students, num_teachers=split.num_teachers)
    try:
        with Liveness(split.store, split.rank, split.world_size, describe, timeout), _one_reports(split.store):
            yield Runtime(device, dist.get_rank(), dist.get_world_size(), split)
    finally:
        dist.destroy_process_group()


@contextmanager
def _one_reports(store: dist.Store | None = None) -> Iterator[None]:
    """Mark the errors of bad input and full disks so that the first rank to stop reports, and no other."""
    try:
        yield
    except UserError as error:
        error.is_reported = not first_to_fail(store)
        raise
    except OSError as error:
        full = disk_full(error)
        if full is None:
            raise
        full.is_reported = not first_to_fail(store)
        raise full from error
    except RuntimeError as error:  # the other end of a collective is gone
        if not another_rank_failed(store):
            raise
        stopped = UserError(f"another rank stopped ({' '.join(str(error).split())[:100]})")
        stopped.is_reported = True
        raise stopped from None


def seed_everything(seed: int, groups: ProcessGroupCollection) -> None:
    """Seed Python's, NumPy's, torch's and Megatron-Core's generators.

    Initial weights and the order of data do not depend on them (``models/parameters.py``, ``data/chunk_order.py``).
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, tp_rank=groups.tp.rank(), ep_rank=0, etp_rank=0)


def _choose_device() -> torch.device:
    if torch.cuda.is_available() and not cpu_backend.is_installed():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    cpu_backend.install()
    return torch.device("cpu")


def _join_world(device: torch.device, timeout: timedelta) -> None:
    store: dist.Store = dist.HashStore()
    rank, world_size = 0, 1
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world_size = _rendezvous(timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
