"""Hidden states that wait for the student: on the device up to a budget, in host memory beyond it."""

from typing import Hashable

import torch
from torch import Tensor


class Stash:
    """Tensors by key, each put once and taken once.

    Args:
        device_bytes: what may be kept on the device at a time. Beyond it a tensor is copied to the host (pinned and
            asynchronously from CUDA) and back when it is taken.
    """

    def __init__(self, device_bytes: int):
        self._budget = device_bytes
        self._kept: dict[Hashable, tuple[Tensor, torch.device]] = {}
        self._on_device: set[Hashable] = set()
        self.device_bytes = self.host_bytes = 0
        self.peak_device_bytes = self.peak_host_bytes = 0

    def put(self, key: Hashable, value: Tensor) -> None:
        """Keep ``value`` until it is taken."""
        device, size = value.device, value.numel() * value.element_size()
        if self.device_bytes + size <= self._budget:
            self._on_device.add(key)
            self.device_bytes += size
        else:
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=device.type == "cuda")
            value = host.copy_(value, non_blocking=True)
            self.host_bytes += size
        self._kept[key] = (value, device)
        self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)
        self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)

    def take(self, key: Hashable) -> Tensor:
        """The tensor of ``key``, on the device that it came from."""
        value, device = self._kept.pop(key)
        size = value.numel() * value.element_size()
        if key in self._on_device:
            self._on_device.remove(key)
            self.device_bytes -= size
        else:
            self.host_bytes -= size
        return value.to(device, non_blocking=True)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._on_device.clear()
        self.device_bytes = self.host_bytes = 0
