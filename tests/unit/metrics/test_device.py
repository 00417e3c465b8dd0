"""Peak FLOP/s and memory of a device."""

import mmap

import pytest
import torch

from megatron_kd.costs.gpus import peak_tflops_of
from megatron_kd.metrics.device import MemoryMeter, peak_flops

CPU = torch.device("cpu")


def test_the_stated_peak_wins_and_a_cpu_has_none():
    assert peak_flops(CPU, 2.5) == 2.5e12 and peak_flops(CPU, None) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("Voodoo 2", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
    ],
)
def test_known_gpus(name, peak):
    assert peak_tflops_of(name) == peak


def test_memory_grows_with_what_is_held():
    meter = MemoryMeter(CPU)
    pages = mmap.mmap(-1, 64 << 20)  # fresh pages: what the allocator kept from earlier tests is resident already
    before = meter.read()
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    assert meter.read() - before > 0.9 * len(pages)
