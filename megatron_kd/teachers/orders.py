"""What the student's ranks want of a remote teacher: an ordered log in the store that all its ranks read alike.

An order is work for all teacher ranks and is never withdrawn: the teacher does what is ordered, in order, and the
student takes what it ordered, or takes and drops it. So both sides always agree on what is under way, whenever the
student stops, evaluates or goes on elsewhere in the data. Saving needs nothing of a teacher whose weights are frozen.
"""

import io
import json
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_KEPT = 1000  # orders that stay in the store behind the newest: more than any teacher rank can lag
_LONGEST_NAP = 0.05


@dataclass(frozen=True)
class Order:
    """Work for the teacher's ranks.

    Attributes:
        position: the global batch of the training data's schedule to work on; None where ``inputs`` are sent.
        inputs: int64 [D, M, 2, b, s], token and position ids of M micro-batches of D data-parallel ranks.
        chunks: int64 [D, M, b], the chunk indices of the rows, which decide what is drawn of a sampled payload.
        hashes: int64 [D, M], sent back with the knowledge.
        stops: nothing follows.
    """

    position: int | None = None
    inputs: Tensor | None = None
    chunks: Tensor | None = None
    hashes: Tensor | None = None
    stops: bool = False

    @property
    def number(self) -> int:
        """What the hand-offs of this order carry as their step."""
        return -1 if self.position is None else self.position


class OrderLog:
    """One end of the log; each has its own place in it."""

    def __init__(self, store: dist.Store):
        self._store = dist.PrefixStore("orders", store)
        self._next = 0

    def write(self, order: Order) -> None:
        """Append an order (by one rank of the student only)."""
        key = str(self._next)
        if order.inputs is None:
            self._store.set(key, json.dumps({"position": order.position, "stops": order.stops}))
        else:
            buffer = io.BytesIO()
            torch.save((order.inputs.int().cpu(), order.chunks.cpu(), order.hashes.cpu()), buffer)
            self._store.set(f"{key}/inputs", buffer.getvalue())
            self._store.set(key, json.dumps({"inputs": True}))
        self._next += 1
        if self._next > _KEPT:
            self._store.delete_key(str(self._next - _KEPT))
            self._store.delete_key(f"{self._next - _KEPT}/inputs")

    def read(self) -> Order:
        """The next order, waiting for it as long as it takes."""
        key = str(self._next)
        nap = 0.001
        while not self._store.check([key]):
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP)
        self._next += 1
        content = json.loads(self._store.get(key))
        if not content.get("inputs"):
            return Order(position=content["position"], stops=content["stops"])
        inputs, chunks, hashes = torch.load(io.BytesIO(self._store.get(f"{key}/inputs")), weights_only=True)
        return Order(inputs=inputs.long(), chunks=chunks, hashes=hashes)

    def acknowledge_stop(self) -> None:
        """A teacher rank has read the last order and needs the store no more."""
        self._store.add("stopped", 1)

    def wait_for_stop(self, num_teachers: int) -> None:
        """Until every teacher rank has."""
        while self._store.add("stopped", 0) < num_teachers:
            time.sleep(0.005)
