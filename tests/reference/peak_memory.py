"""Peak and largest allocation of a function on the CPU, from the allocator's own events."""

from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocations:
    """Bytes beyond what was allocated before: the ``peak`` of what is alive together, the ``largest`` single block."""

    peak: int
    largest: int


def measure(function: Callable[[], Any]) -> Allocations:
    """Run ``function`` once under torch's allocation profiler. Memory inside of library kernels is not seen."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    del result
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not events:
        raise RuntimeError("torch's profiler recorded no allocations")
    alive = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
        largest = max(largest, event.nbytes())
    return Allocations(peak, largest)


def measure_bytes_of(tensor_shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a tensor of that shape."""
    return torch.Size(tensor_shape).numel() * dtype.itemsize
