"""GPUs by name: dense bf16 peak, memory and links, from NVIDIA's data sheets; MFU and time refer to them."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One accelerator.

    Attributes:
        peak_tflops: dense bf16, without sparsity.
        memory_bytes: what a process can allocate, a little below the nominal size.
        link_gb_per_second: to GPUs of the same node, one direction (NVLink, or PCIe where there is none).
    """

    name: str
    peak_tflops: float
    memory_bytes: int
    link_gb_per_second: float


GPUS: dict[str, GPU] = {
    "a100": GPU("A100 SXM 80 GB", 312.0, 79 * GIB, 300.0),
    "h100": GPU("H100 SXM 80 GB", 989.5, 79 * GIB, 450.0),
    "h200": GPU("H200 SXM 141 GB", 989.5, 139 * GIB, 450.0),
    "b200": GPU("B200 SXM 180 GB", 2250.0, 178 * GIB, 900.0),
    "l40s": GPU("L40S 48 GB", 362.0, 44 * GIB, 32.0),
}


def peak_tflops_of(device_name: str) -> float | None:
    """Peak of the device that calls itself ``device_name`` (``NVIDIA H100 80GB HBM3``); None where it is not listed.

    The PCIe and NVL boards of a listed GPU are slower, and not listed.
    """
    lowered = device_name.lower()
    if "h100" in lowered and ("pcie" in lowered or "nvl" in lowered):
        return None
    return next((gpu.peak_tflops for key, gpu in GPUS.items() if key in lowered), None)
