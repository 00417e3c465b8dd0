"""What this rank's device can do and has used: peak FLOP/s, by which MFU is measured, and memory."""

import os

import psutil
import torch

from megatron_kd.costs.gpus import peak_tflops_of


def peak_flops(device: torch.device, stated_tflops: float | None) -> float | None:
    """Return the dense peak FLOP/s of one device: as stated, else as known for this GPU, else None."""
    if stated_tflops is not None:
        return stated_tflops * 1e12
    if device.type != "cuda":
        return None
    known = peak_tflops_of(torch.cuda.get_device_name(device))
    return None if known is None else known * 1e12


class MemoryMeter:
    """The memory of this rank: the allocator's peak (``max_memory_allocated``) on CUDA, the resident set on a CPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._process = psutil.Process(os.getpid())

    def read(self) -> int:
        """Return the number of bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return self._process.memory_info().rss
