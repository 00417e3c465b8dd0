"""The collectives of a tensor-parallel loss over an explicit process group; no group means one rank.

Every call is one collective of the group when it has more than one rank, and none otherwise.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TensorParallel:
    """Reductions over the tensor-parallel group. All results are equal on its ranks."""

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def max_(self, values: Tensor) -> Tensor:
        """Element-wise maximum over the ranks, in place: one all-reduce."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.group)
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, in place: one all-reduce."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def gather_sequence(self, hidden: Tensor) -> Tensor:
        """[s / TP, ...] of every rank to [s, ...] in rank order: one all-gather."""
        if self.size == 1:
            return hidden
        gathered = hidden.new_empty((hidden.shape[0] * self.size, *hidden.shape[1:]))
        dist.all_gather_into_tensor(gathered, hidden.contiguous(), group=self.group)
        return gathered

    def scatter_sequence(self, gradient: Tensor) -> Tensor:
        """Sum of [s, ...] over the ranks, of which this rank keeps its [s / TP, ...]: one reduce-scatter."""
        if self.size == 1:
            return gradient
        scattered = gradient.new_empty((gradient.shape[0] // self.size, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(scattered, gradient.contiguous(), op=dist.ReduceOp.SUM, group=self.group)
        return scattered
