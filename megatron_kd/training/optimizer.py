"""AdamW on Megatron-Core's distributed optimizer, and the learning-rate schedule.

Megatron-Core uses Transformer Engine's or Apex's FusedAdam where installed. With torch's AdamW its fully reshardable
checkpoints have three faults, one of them silent; :func:`make_torch_adam_checkpointable` mends them (see its text).

What a fully reshardable checkpoint holds of Megatron-Core's distributed optimizer: every parameter's state, whole.

Megatron-Core (0.16.1, 0.19.2) lays the buckets of a buffer one after another without the padding at their ends, and
then cuts parameters out at their padded places. Behind the first bucket that ends in padding (a tied embedding under
pipeline parallelism has a bucket of its own; so has every 40M parameters with overlapped reduction) a parameter is
saved with a part of its neighbour's moments, and nothing says so. It also passes over the state seven times. Here
every value is looked up at its place: without data parallelism nothing is copied, with it each value is once.
"""

import math
from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class OptimizerConfig:
    """The ``optimizer.*`` keys. Defaults are MiniPLM's (arXiv 2410.17215) except the rate."""

    lr: float = 1e-3
    min_lr: float | None = None
    """None means a tenth of ``lr``."""
    lr_warmup_iters: int = 0
    weight_decay: float = 0.01
    weight_decay_on_norms_and_biases: bool = True
    """MiniPLM decays every parameter; Megatron's custom is False."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-6
    clip_grad: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        if self.lr <= 0:
            yield f"'optimizer.lr' must be above 0, not {self.lr}"
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            yield f"'optimizer.min_lr' must be between 0 and optimizer.lr {self.lr}, not {self.min_lr}"
        for name in ("weight_decay", "clip_grad", "lr_warmup_iters"):
            if getattr(self, name) < 0:
                yield f"'optimizer.{name}' must not be negative, it is {getattr(self, name)}"
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"'optimizer.{name}' must be in [0, 1), not {getattr(self, name)}"


def learning_rate(step: int, config: OptimizerConfig, train_iters: int) -> float:
    """The rate of ``step`` (from 0): linear warm-up from 0, then half a cosine down to ``min_lr``.

    Source: MiniPLM's schedule; the first step of a warm-up has rate 0.
    """
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    if step < config.lr_warmup_iters:
        return config.lr * step / config.lr_warmup_iters
    done = (step - config.lr_warmup_iters) / max(1, train_iters - config.lr_warmup_iters)
    return low + 0.5 * (config.lr - low) * (1.0 + math.cos(math.pi * min(1.0, done)))


def build_optimizer(
    config: OptimizerConfig, model: Sequence[torch.nn.Module], groups: ProcessGroupCollection, *, bf16: bool
) -> ChainedOptimizer:
    """Megatron-Core's distributed optimizer over DDP-wrapped model chunks; fp32 master weights under bf16."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=model[0].ddp_config.overlap_param_gather,
    )
    overrides = {} if config.weight_decay_on_norms_and_biases else None
    optimizer = get_megatron_optimizer(
        settings, list(model), config_overrides=overrides, use_gloo_process_groups=False, pg_collection=groups
    )
    for group in optimizer.param_groups:  # Megatron-Core leaves this to its own scheduler, which is not used here
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    for part in optimizer.chained_optimizers:
        if not isinstance(part, DistributedOptimizer):
            continue
        save_state_at_its_place(part)
        if isinstance(part.optimizer, torch.optim.AdamW):
            use_fused_kernel(part.optimizer)
            make_torch_adam_checkpointable(part)
    return optimizer


def set_learning_rate(optimizer: ChainedOptimizer, rate: float) -> None:
    """The same rate for every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clipped_step(optimizer: ChainedOptimizer, gradient_norm: float, max_norm: float) -> None:
    """Scale the prepared gradients to at most ``max_norm`` and update the weights.

    Megatron-Core's own scaling makes a scaled copy of every gradient first where Transformer Engine and Apex are
    absent.
    """
    scale = max_norm / (gradient_norm + 1e-6)
    if 0 < scale < 1:
        for part in optimizer.chained_optimizers:
            gradients = [parameter.grad for parameter in part.get_parameters() if parameter.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, scale)
    optimizer.step_with_ready_grads()


def use_fused_kernel(adam: torch.optim.AdamW) -> None:
    """Switch torch's AdamW to its single fused kernel, which exists for CPU and CUDA."""
    adam.defaults.update(fused=True, foreach=False)
    for group in adam.param_groups:
        group.update(fused=True, foreach=False)


def make_torch_adam_checkpointable(optimizer: DistributedOptimizer) -> None:
    """Make Megatron-Core's fully reshardable checkpoints right with torch's AdamW.

    Three faults (seen in Megatron-Core 0.16.1 and 0.19.2) and what is done here:

    * the state dict of an optimizer that has not stepped yet asserts: the state is created at once, with step 0;
    * loading asks each parameter's state for a ``step`` that the format does not store: its own is passed through;
    * after loading, all parameters share one ``step`` tensor, so one optimizer step advances it once a parameter and
      the bias correction is silently wrong: each parameter gets a copy of its own.
    """
    adam = optimizer.optimizer
    for parameter in _parameters(adam):
        adam.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    set_states, load_state_dict = optimizer._set_main_param_and_optimizer_states, optimizer.load_state_dict

    def set_states_with_step(model_parameter: torch.nn.Parameter, tensors: Mapping[str, Any]) -> None:
        group, index = optimizer.model_param_group_index_map[model_parameter]
        step = adam.state[adam.param_groups[group]["params"][index]]["step"]
        set_states(model_parameter, {"step": step, **tensors})

    def load_with_own_steps(state_dict: Mapping[str, Any]) -> None:
        load_state_dict(state_dict)
        for parameter in _parameters(adam):
            adam.state[parameter]["step"] = adam.state[parameter]["step"].detach().clone()

    optimizer._set_main_param_and_optimizer_states = set_states_with_step
    optimizer.load_state_dict = load_with_own_steps


def _parameters(adam: torch.optim.AdamW) -> Iterator[torch.Tensor]:
    for group in adam.param_groups:
        yield from group["params"]


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
