"""Units of work handed to whichever replica of the model is free, so that slow and fast ranks end together.

The first rank of a replica takes the next number from a counter in the world's key-value store and tells the others of
its replica. No replica waits for another one.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection


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
