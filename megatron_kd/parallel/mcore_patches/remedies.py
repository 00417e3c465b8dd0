"""Remedies for faults of Megatron-Core's models with explicit process groups, and of its distributed optimizer.

Each function is the remedy of an entry of ``patch_table.py``, which says what is wrong and in which versions. The
checkpoints meant here are the fully reshardable ones, which hold every parameter's state whole.
"""

from contextlib import contextmanager
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

_ADAM_KEYS = ("exp_avg", "exp_avg_sq")
_PARTITION_DIMENSIONS: dict[type, int] = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}


def pipeline_communication(*, is_interleaved: bool) -> dict[str, bool]:
    """Return the ``TransformerConfig`` fields under which a pipeline's point-to-point calls give right results."""
    return {"overlap_p2p_comm": is_interleaved, "batch_p2p_comm": not is_interleaved}


def ensure_sequence_parallel_workspace() -> None:
    """Create the process-wide scratch buffer that linear layers gather sequence-parallel inputs into."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


@contextmanager
def replica_of_tied_output_layer(groups: ProcessGroupCollection) -> Iterator[None]:
    """Let global state answer, inside the block, which data-parallel replica the output layer belongs to."""
    parallel_state.set_data_parallel_rank(groups.dp_cp.rank())
    try:
        yield
    finally:
        parallel_state.set_data_parallel_rank(None)


def use_rotary_kernel(kernel: Callable[[Tensor, Tensor, bool], Tensor]) -> None:
    """Make ``apply_rope_fusion`` call ``kernel(values, angles, interleaved)`` in this process."""
    rope_utils.fused_apply_rotary_pos_emb = kernel


def scale_rotary(
    rotary: RotaryEmbedding, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_positions: int
) -> None:
    """Stretch the rotary frequencies as Llama 3.1 does, with the bounds of config.json."""
    rotary.inv_freq = rotary._apply_scaling(
        rotary.inv_freq, factor, low_freq_factor, high_freq_factor, original_positions
    )


def mark_sharded_weights(model: torch.nn.Module) -> None:
    """Mark which weights are shards, and along which dimension; gradient norms and placement read it."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        dimension = _PARTITION_DIMENSIONS.get(type(module))
        if dimension is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dimension, 1)


def patch_optimizer(optimizer: ChainedOptimizer, weight_decay: float) -> None:
    """Apply every remedy that an optimizer of ``get_megatron_optimizer`` needs, once, before its first step.

    Args:
        weight_decay: of parameters whose ``wd_mult`` is 1.
    """
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay * group["wd_mult"]
    for part in optimizer.chained_optimizers:
        if not isinstance(part, DistributedOptimizer):
            continue
        save_state_at_its_place(part)
        if isinstance(part.optimizer, torch.optim.AdamW):
            use_fused_kernel(part.optimizer)
            make_torch_adam_checkpointable(part)


def use_fused_kernel(adam: torch.optim.AdamW) -> None:
    """Switch torch's AdamW to its single fused kernel, which exists for CPU and CUDA."""
    adam.defaults.update(fused=True, foreach=False)
    for group in adam.param_groups:
        group.update(fused=True, foreach=False)


def make_torch_adam_checkpointable(optimizer: DistributedOptimizer) -> None:
    """Create AdamW's state, and make loading give every parameter a step count of its own.

    Megatron-Core's loading asks each parameter's state for a ``step`` that the format does not store, so the
    parameter's own is passed through; afterwards all parameters share one ``step`` tensor, so each gets a copy.
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

    _replace_method(optimizer, "_set_main_param_and_optimizer_states", set_states_with_step)
    _replace_method(optimizer, "load_state_dict", load_with_own_steps)


def save_state_at_its_place(optimizer: DistributedOptimizer) -> None:
    """Make ``sharded_state_dict`` read every parameter's state at its own place in the buffer.

    Without data parallelism nothing is copied; with it every value is copied once.
    """

    def state(
        use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
    ) -> dict[int, dict[Any, Any]]:
        del use_gloo_comm, return_on_all_ranks  # a fully reshardable checkpoint asks for all ranks
        build = _empty_state if empty_data else _own_state
        if not empty_data and optimizer.data_parallel_group.size() > 1:
            build = _gathered_state
        return {
            index: {dtype: build(optimizer, index, buckets) for dtype, buckets in ranges.items()}
            for index, ranges in enumerate(optimizer.gbuf_ranges)
        }

    _replace_method(optimizer, "get_parameter_state_dp_zero", state)


def clipped_step(optimizer: ChainedOptimizer, gradient_norm: float, max_norm: float) -> None:
    """Scale the prepared gradients to at most ``max_norm`` (0: leave them) and update the weights."""
    scale = max_norm / (gradient_norm + 1e-6)
    if 0 < scale < 1:
        for part in optimizer.chained_optimizers:
            gradients = [parameter.grad for parameter in part.get_parameters() if parameter.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, scale)
    optimizer.step_with_ready_grads()


def gather_parameters(model: Sequence[DistributedDataParallel]) -> None:
    """Bring every rank's parameters up to date after an update. Collective over the data-parallel group.

    Does nothing without overlapped parameter gathering, where the update itself gathers.
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _replace_method(instance: object, name: str, function: Callable[..., Any]) -> None:
    """Replace a method of one object of Megatron-Core's; its class and other objects stay as they are."""
    assert hasattr(instance, name), f"{type(instance).__name__} has no '{name}' to replace"
    setattr(instance, name, function)


def _parameters(adam: torch.optim.AdamW) -> Iterator[torch.Tensor]:
    for group in adam.param_groups:
        yield from group["params"]


class _Slices(dict[tuple[int, int], torch.Tensor]):
    """Stands for a flat buffer: ``[start:end]`` is the parameter that has this place in it."""

    def __getitem__(self, place: Any) -> torch.Tensor:
        return super().__getitem__((place.start, place.stop))


def _state_keys(optimizer: DistributedOptimizer) -> tuple[str, ...]:
    return ("param", *getattr(optimizer, "optimizer_state_keys", _ADAM_KEYS))  # 0.16 has Adam's alone


def _own_state(optimizer: DistributedOptimizer, index: int, buckets: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The optimizer's own tensors: one rank has all of each."""
    places = optimizer.buffers[index].param_index_map
    found = {key: _Slices() for key in _state_keys(optimizer)}
    for bucket in buckets:
        for parameter in bucket["param_map"]:
            tensors = optimizer._get_main_param_and_optimizer_states(parameter)
            start, end = places[parameter][:2]
            for key, slices in found.items():
                slices[start, end] = tensors[key].detach().flatten()
    return found


def _empty_state(optimizer: DistributedOptimizer, index: int, buckets: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Memory to load into."""
    size = optimizer.buffers[index].numel
    return {key: torch.zeros(size, dtype=torch.float32) for key in _state_keys(optimizer)}


def _gathered_state(optimizer: DistributedOptimizer, index: int, buckets: list[Mapping[str, Any]]) -> dict[str, Any]:
    """All ranks' parts, on the CPU, padding included. Collective over the data-parallel group."""
    buffer, group = optimizer.buffers[index], optimizer.data_parallel_group
    whole = {key: torch.empty(buffer.numel, dtype=torch.float32) for key in _state_keys(optimizer)}
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
