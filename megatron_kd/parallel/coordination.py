"""Coordination of ranks: work of the main rank, who reports a failure, and a queue that free replicas take from."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.errors import UserError, disk_full

_FAILURES_KEY = "megatron_kd/failures"
ResultT = TypeVar("ResultT")


def on_main_rank(action: Callable[[], ResultT]) -> ResultT:
    """Run ``action()`` on rank 0 and return its value on every rank. Collective over the world.

    Raises:
        UserError: rank 0 raised one (on every rank, of the same type and text), or an OSError.
    """
    outcome: list[tuple[ResultT | None, UserError | None] | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [(action(), None)]
        except UserError as error:
            outcome = [(None, error)]
        except OSError as error:
            other = UserError(f"{error.strerror or error} ({error.filename or 'output'})")
            outcome = [(None, disk_full(error) or other)]
    dist.broadcast_object_list(outcome, src=0)
    assert outcome[0] is not None
    value, failure = outcome[0]
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]  # None only where ``action`` returns it


def first_to_fail(store: dist.Store | None = None) -> bool:
    """Count this rank's failure; return whether no other rank has failed before. The first reports, others are silent.

    Args:
        store: shared by all ranks of the job; None means the default group's.
    """
    try:
        return _count_failures(store, 1) == 1
    except Exception:  # noqa: BLE001 - the store ended with the rank that failed first
        return False


def another_rank_failed(store: dist.Store | None = None) -> bool:
    """Return whether a rank has reported a failure, which this rank's own error is then a consequence of."""
    try:
        return _count_failures(store, 0) > 0
    except Exception:  # noqa: BLE001 - without the store nothing is known of the others
        return False


def _count_failures(store: dist.Store | None, added: int) -> int:
    return (store or dist.distributed_c10d._get_default_store()).add(_FAILURES_KEY, added)


class WorkQueue:
    """Iterates over the units that this rank's replica of the model takes.

    The first rank of a replica takes the next number from a counter in the world's key-value store and broadcasts it
    inside the replica, so that slow and fast replicas end together. No replica waits for another one.

    Args:
        units: everything to do; the same on every rank.
        name: the counter's, unique in the life of the world, the same on every rank.
        groups: of the model; ``groups.mp`` is a replica.
        device: for the broadcast.
    """

    def __init__(self, units: Sequence[int], name: str, groups: ProcessGroupCollection, device: torch.device) -> None:
        self._units, self._key, self._device = units, f"megatron_kd/work/{name}", device
        self._replica: dist.ProcessGroup = groups.mp
        self._store = dist.distributed_c10d._get_default_store()

    def __iter__(self) -> Iterator[int]:
        while (place := self._next()) < len(self._units):
            yield self._units[place]

    def num_taken(self) -> int:
        """Return how many units have been taken, over all replicas."""
        return min(self._store.add(self._key, 0), len(self._units))

    def _next(self) -> int:
        place = self._store.add(self._key, 1) - 1 if self._replica.rank() == 0 else 0
        if self._replica.size() == 1:
            return place
        message = torch.tensor([place], dtype=torch.int64, device=self._device)
        dist.broadcast(message, src=dist.get_global_rank(self._replica, 0), group=self._replica)
        return int(message.item())
