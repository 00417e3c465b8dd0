"""What a fully reshardable checkpoint holds of Megatron-Core's distributed optimizer: every parameter's state, whole.

Megatron-Core (0.16.1, 0.19.2) lays the buckets of a buffer one after another without the padding at their ends, and
then cuts parameters out at their padded places. Behind the first bucket that ends in padding (a tied embedding under
pipeline parallelism has a bucket of its own; so has every 40M parameters with overlapped reduction) a parameter is
saved with a part of its neighbour's moments, and nothing says so. It also passes over the state seven times. Here
every value is looked up at its place: without data parallelism nothing is copied, with it each value is once.
"""

from typing import Any, Mapping

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_ADAM_KEYS = ("exp_avg", "exp_avg_sq")


def save_state_at_its_place(optimizer: DistributedOptimizer) -> None:
    """Make ``sharded_state_dict`` take the state from here."""

    def state(use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False) -> dict:
        del use_gloo_comm, return_on_all_ranks  # the format that is used here asks for all ranks
        build = _empty if empty_data else _own if optimizer.data_parallel_group.size() == 1 else _gathered
        return {
            index: {dtype: build(optimizer, index, buckets) for dtype, buckets in ranges.items()}
            for index, ranges in enumerate(optimizer.gbuf_ranges)
        }

    optimizer.get_parameter_state_dp_zero = state


class _Slices(dict):
    """Stands for a flat buffer: ``[start:end]`` is the parameter that has this place in it."""

    def __getitem__(self, place: slice) -> torch.Tensor:
        return super().__getitem__((place.start, place.stop))


def _keys(optimizer: DistributedOptimizer) -> tuple[str, ...]:
    return ("param", *getattr(optimizer, "optimizer_state_keys", _ADAM_KEYS))


def _own(optimizer: DistributedOptimizer, index: int, buckets: list[Mapping[str, Any]]) -> dict[str, _Slices]:
    """The optimizer's own tensors: one rank has all of each."""
    places = optimizer.buffers[index].param_index_map
    found = {key: _Slices() for key in _keys(optimizer)}
    for bucket in buckets:
        for parameter in bucket["param_map"]:
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
            for key, slices in found.items():
                slices[places[parameter][:2]] = tensors[key].detach().flatten()
    return found


def _empty(optimizer: DistributedOptimizer, index: int, buckets: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Memory to load into."""
    size = optimizer.buffers[index].numel
    return {key: torch.zeros(size, dtype=torch.float32) for key in _keys(optimizer)}


def _gathered(optimizer: DistributedOptimizer, index: int, buckets: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """All ranks' parts, on the CPU, padding included. Collective over the data-parallel group."""
    buffer, group = optimizer.buffers[index], optimizer.data_parallel_group
    whole = {key: torch.empty(buffer.numel, dtype=torch.float32) for key in _keys(optimizer)}
    for bucket, ranges in zip(buffer.buckets, buckets, strict=True):
        size, device = bucket.grad_data.numel(), bucket.grad_data.device
        for key, target in whole.items():
            part = torch.zeros(size // group.size(), dtype=torch.float32, device=device)
            for parameter, places in ranges["param_map"].items():
                place = places["gbuf_local"]
                tensor = optimizer._get_main_param_and_optimizer_states(parameter)[key]
                part[place.start : place.end].copy_(tensor.detach().flatten())
            target = target[bucket.offset : bucket.offset + size]
            gathered = target if device.type == "cpu" else torch.empty(size, dtype=torch.float32, device=device)
            dist.all_gather_into_tensor(gathered, part, group=group)
            if gathered is not target:
                target.copy_(gathered)
    return whole
