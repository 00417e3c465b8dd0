"""GPUs by name (dense bf16 peak, memory and links, from NVIDIA's data sheets), and what a plan assumes beside them."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_kd.models.architecture import ARCHITECTURES

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """An accelerator.

    Attributes:
        peak_tflops: dense bf16, without sparsity.
        memory_bytes: bytes that a process can allocate, a little below the nominal size.
        link_gb_per_second: bandwidth to GPUs of the same node, one direction (NVLink, or PCIe without it).
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
    """Return the peak of the device with this name (``NVIDIA H100 80GB HBM3``); None if it is not listed.

    The PCIe and NVL boards of a listed GPU are slower, and are not listed.
    """
    lowered = device_name.lower()
    if "h100" in lowered and ("pcie" in lowered or "nvl" in lowered):
        return None
    return next((gpu.peak_tflops for key, gpu in GPUS.items() if key in lowered), None)


@dataclass(frozen=True)
class PlanConfig:
    """The ``plan.*`` keys: hardware, models and corpus, which a training configuration does not name."""

    gpu: str = "h100"
    num_gpus: int = 8
    gpus_per_node: int = 8
    mfu: float = 0.4
    """Share of the peak that the whole job reaches, the teacher's FLOPs counted; time follows from it."""
    network_gb_per_second: float = 50.0
    """A GPU's share of the network between nodes, one direction (50 for 400 Gb/s InfiniBand per GPU)."""
    usable_memory: float = 0.9
    """Share of a GPU's memory that a layout may fill; the rest is for fragmentation, NCCL and cuBLAS."""
    teacher: str | None = None
    """Architecture of the teacher, by name; None for a plan without a teacher."""
    reference: str = "qwen_104m"
    baseline_steps: int | None = None
    """Steps of plain pre-training that other methods' budgets match; None for ``training.train_iters``."""
    seq_length: int = 1024
    """Positions of a row, where ``data.seq_length`` leaves them to the dataset."""
    corpus_tokens: float = 100e9
    reference_tokens: float = 5e9
    ratio: float = 0.5
    output: str | None = None
    """A JSON file for the whole plan."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if self.gpu not in GPUS:
            yield f"'plan.gpu' is '{self.gpu}', not one of {', '.join(GPUS)}"
        for name in ("teacher", "reference"):
            value = getattr(self, name)
            if value is not None and value not in ARCHITECTURES:
                yield f"'plan.{name}' is '{value}', not one of {', '.join(ARCHITECTURES)}"
        for name in ("num_gpus", "gpus_per_node", "seq_length"):
            if getattr(self, name) < 1:
                yield f"'plan.{name}' must be at least 1, not {getattr(self, name)}"
        for name in ("mfu", "usable_memory", "ratio"):
            if not 0 < getattr(self, name) <= 1:
                yield f"'plan.{name}' must be above 0 and at most 1, not {getattr(self, name)}"
        for name in ("corpus_tokens", "reference_tokens", "network_gb_per_second"):
            if getattr(self, name) <= 0:
                yield f"'plan.{name}' must be above 0, not {getattr(self, name)}"
        if self.baseline_steps is not None and self.baseline_steps < 1:
            yield f"'plan.baseline_steps' must be at least 1, not {self.baseline_steps}"
