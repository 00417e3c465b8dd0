"""What a training step really holds, by category: bytes of the tensors themselves, read on the rank."""

from typing import Any

import torch

from megatron_kd.config import load_config
from megatron_kd.data.batch import make_batch
from megatron_kd.data.chunk_order import BatchSchedule, ChunkOrder


class _Kept:
    """A tensor that autograd keeps; the storage counts as long as one of these refers to it."""

    def __init__(self, tensor: torch.Tensor, ledger: "Ledger"):
        self.tensor, self.ledger, self.key = tensor, ledger, tensor.untyped_storage().data_ptr()
        ledger.add(self.key, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        self.ledger.remove(self.key)


class Ledger:
    """Bytes that autograd keeps, each storage once; ``peak`` is the most at one time."""

    def __init__(self, ignored: set[int]):
        self.ignored, self.holders, self.sizes, self.now, self.peak = ignored, {}, {}, 0, 0

    def add(self, key: int, size: int) -> None:
        if key in self.ignored:
            return
        if not self.holders.get(key):
            self.sizes[key] = size
            self.now += size
        self.holders[key] = self.holders.get(key, 0) + 1
        self.peak = max(self.peak, self.now)

    def remove(self, key: int) -> None:
        if key in self.ignored:
            return
        self.holders[key] -= 1
        if not self.holders[key]:
            self.now -= self.sizes[key]


def measure_step(settings: list[str]) -> dict[str, float]:
    """Bytes by category on this rank, after one step of the run that ``settings`` describe."""
    from megatron_kd.logs import silence_known_noise
    from megatron_kd.parallel.groups import create_process_groups
    from megatron_kd.parallel.runtime import distributed_runtime

    silence_known_noise()
    from megatron_kd.training.optimizer import build_optimizer
    from megatron_kd.training.train_config import TrainConfig
    from megatron_kd.training.training_run import build_student, build_teacher, open_run

    config = load_config(TrainConfig, None, settings)
    with distributed_runtime() as runtime:
        run = open_run(config, runtime)
        groups = create_process_groups(run.layout)
        teacher = build_teacher(run, groups)
        model = build_student(run, groups)
        optimizer = build_optimizer(config.optimizer, model, groups, bf16=config.training.precision == "bf16")
        peaks = _one_step(run, groups, teacher, model, optimizer)
        return {
            "weights": _bytes(p for chunk in model for p in chunk.parameters()),
            "gradients": float(
                sum(b.grad_data.nbytes for chunk in model for b in [*chunk.buffers, *chunk.expert_parallel_buffers])
            ),
            "optimizer": _optimizer_bytes(optimizer),
            "teacher_weights": _teacher_bytes(teacher),
            "waiting": 0.0
            if teacher is None
            else float(teacher.stash.peak_device_bytes + teacher.stash.peak_host_bytes),
            **peaks,
        }


def _one_step(run: Any, groups: Any, teacher: Any, model: Any, optimizer: Any) -> dict:
    from megatron_kd.teachers.interface import Action, Decision
    from megatron_kd.training.methods.method_builders import MethodParts, build_losses
    from megatron_kd.training.objective import FusedLoss, MicroBatchLoss
    from megatron_kd.training.train_step import TrainStep

    settings, data, device = run.config.training, run.data, run.device
    order = BatchSchedule(ChunkOrder(data.num_chunks, seed=1, shuffle=False), settings.global_batch_size)
    rows = order.micro_batches(0, groups.dp.rank(), groups.dp.size(), settings.micro_batch_size)
    batches = [make_batch(data, indices, run.seq_length).to(device) for indices in rows]
    fused = FusedLoss(groups, run.config.distillation.loss)
    losses = build_losses(MethodParts(run, groups, model, teacher, fused))
    step = TrainStep(
        model=model,
        optimizer=optimizer,
        groups=groups,
        teacher=teacher,
        clip_grad=1.0,
        micro_batch_loss=MicroBatchLoss(losses, teacher),
    )
    if teacher is not None:
        teacher.follow(Decision(Action.CONTINUE, 0, 0))
    ledger = Ledger(
        {p.untyped_storage().data_ptr() for chunk in model for p in chunk.parameters()}
        | {b.grad_data.untyped_storage().data_ptr() for chunk in model for b in chunk.buffers}
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(t, ledger), lambda kept: kept.tensor):
        step(batches, 1e-3)
    peak = {}
    if device.type == "cuda":  # of a second step: the first one makes the optimizer's state
        torch.cuda.reset_peak_memory_stats()
        step(batches, 1e-3)
        peak = {"peak": float(torch.cuda.max_memory_allocated())}
    kept = fused._workspace._kept.values()
    return {"saved": float(ledger.peak), "loss_tiles": float(sum(buffer.nbytes for buffer in kept)), **peak}


def _teacher_bytes(teacher: Any) -> float:
    """Parameters on this rank, and its part of the output layer where that is a copy."""
    if teacher is None:
        return 0.0
    own = [p for chunk in teacher._model_chunks for p in chunk.parameters()]
    held = {p.untyped_storage().data_ptr() for p in own}
    head = [] if teacher._head is None else [teacher._head.weight]
    return _bytes([*own, *(w for w in head if w.untyped_storage().data_ptr() not in held)])


def _bytes(tensors: Any) -> float:
    return float(sum(t.nbytes for t in {id(t): t for t in tensors}.values()))


def _optimizer_bytes(optimizer: Any) -> float:
    """Adam's moments and, under bf16, the fp32 master weights."""
    total = 0
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            total += sum(t.nbytes for t in state.values() if torch.is_tensor(t) and t.dim())
        masters = getattr(part, "shard_fp32_from_float16_groups", None) or []
        total += sum(t.nbytes for group in masters for t in group if t is not None)
    return float(total)
