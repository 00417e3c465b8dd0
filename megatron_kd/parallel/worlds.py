"""One torchrun world split into two: the student's ranks and, behind them, the teacher's.

Each has a default process group of its own, so whatever is collective over "the world" (checkpoints, Megatron-Core's
optimizer, agreement on failures) is so over one of the two. A third group, the bridge, spans all ranks and carries
nothing but what a teacher sends; orders go through the store.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from megatron_kd.errors import LayoutError
from megatron_kd.parallel.meeting_point import meet

Role = Literal["student", "teacher"]
BRIDGE_TIMEOUT = timedelta(days=7)  # a student may evaluate or save for long; a dead rank is found by liveness.py


@dataclass(frozen=True)
class SplitWorld:
    """Where this process stands in the split world."""

    role: Role
    rank: int
    """In the whole world; the student's ranks come first."""
    num_students: int
    num_teachers: int
    store: dist.Store
    bridge: dist.ProcessGroup
    """Over the whole world; not registered with torch.distributed: its own ``send`` and ``recv`` are used."""

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.num_students + self.num_teachers


def describe_rank(rank: int, *, num_students: int, num_teachers: int) -> str:
    """``rank 5 (teacher rank 1 of 2)``."""
    if rank < num_students:
        return f"rank {rank} (student rank {rank} of {num_students})"
    return f"rank {rank} (teacher rank {rank - num_students} of {num_teachers})"


def join_split_world(num_teachers: int, device: torch.device, timeout: timedelta) -> SplitWorld:
    """Join the world that the environment names (torchrun's variables), as one of the student's or teacher's ranks.

    Raises:
        LayoutError: the world has no rank left for the student.
    """
    store, rank, world_size = meet(timeout)
    num_students = world_size - num_teachers
    if num_students < 1:
        raise LayoutError(
            f"teacher.num_ranks {num_teachers} of {world_size} ranks leaves none for the student: start more ranks"
        )
    on_cuda = device.type == "cuda"
    role: Role = "student" if rank < num_students else "teacher"
    bridge_store = dist.PrefixStore("bridge", store)
    if on_cuda:
        bridge = dist.ProcessGroupNCCL(bridge_store, rank, world_size, BRIDGE_TIMEOUT)
    else:
        bridge = dist.ProcessGroupGloo(bridge_store, rank, world_size, BRIDGE_TIMEOUT)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=dist.PrefixStore(role, store),
        rank=rank if role == "student" else rank - num_students,
        world_size=num_students if role == "student" else num_teachers,
        timeout=timeout,
        **({"device_id": device} if on_cuda else {}),
    )
    return SplitWorld(role, rank, num_students, num_teachers, store, bridge)
