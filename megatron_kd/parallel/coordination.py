"""How ranks agree on what only one of them knows: work of the main rank, and which rank reports a failure.

Units of work handed to whichever replica of the model is free, so that slow and fast ranks end together.

The first rank of a replica takes the next number from a counter in the world's key-value store and tells the others of
its replica. No replica waits for another one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Callable

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.errors import UserError, disk_full

_FAILURES_KEY = "megatron_kd/failures"


def on_main_rank(action: Callable[[], Any]) -> Any:
    """``action()`` on rank 0; its value on every rank. Collective over the world.

    Raises:
        UserError: rank 0 raised one (on every rank, of the same type and text), or an OSError.
    """
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [("value", action())]
        except UserError as error:
            outcome = [("error", error)]
        except OSError as error:
            other = UserError(f"{error.strerror or error} ({error.filename or 'output'})")
            outcome = [("error", disk_full(error) or other)]
    dist.broadcast_object_list(outcome, src=0)
    kind, value = outcome[0]
    if kind == "error":
        raise value
    return value


def first_to_fail(store: dist.Store | None = None) -> bool:
    """Whether no other rank has failed before this one: the first one reports, the others end quietly.

    ``store`` is shared by all ranks of the job; None means the default group's.
    """
    try:
        return (store or dist.distributed_c10d._get_default_store()).add(_FAILURES_KEY, 1) == 1
    except Exception:  # noqa: BLE001 - the store went away with the rank that failed first
        return False


def another_rank_failed(store: dist.Store | None = None) -> bool:
    """Whether a rank has reported a failure: what this rank ran into is then its consequence."""
    try:
        return (store or dist.distributed_c10d._get_default_store()).add(_FAILURES_KEY, 0) > 0
    except Exception:  # noqa: BLE001 - nothing is known of the others
        return False


class WorkQueue:
    """Iterates over the units that this rank's replica is given.

    Args:
        units: all there is to do; the same on every rank.
        name: of the counter; unique in the life of the world, the same on every rank.
        groups: of the model; ``groups.mp`` is a replica.
        device: for the message inside a replica.
    """

    def __init__(self, units: Sequence[int], name: str, groups: ProcessGroupCollection, device: torch.device) -> None:
        self._units, self._key, self._device = units, f"megatron_kd/work/{name}", device
        self._replica = groups.mp
        self._store = dist.distributed_c10d._get_default_store()

    def __iter__(self) -> Iterator[int]:
        while (place := self._next()) < len(self._units):
            yield self._units[place]

    def num_taken(self) -> int:
        """Units handed out so far, over all replicas."""
        return min(self._store.add(self._key, 0), len(self._units))

    def _next(self) -> int:
        place = self._store.add(self._key, 1) - 1 if self._replica.rank() == 0 else 0
        if self._replica.size() == 1:
            return place
        message = torch.tensor([place], dtype=torch.int64, device=self._device)
        dist.broadcast(message, src=dist.get_global_rank(self._replica, 0), group=self._replica)
        return int(message.item())
