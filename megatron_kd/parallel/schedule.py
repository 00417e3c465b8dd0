"""Megatron-Core's pipeline schedules, called with explicit groups, and forward-only passes that collect results."""

from typing import Any, Callable, Iterator, Sequence, TypeVar

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

ItemT = TypeVar("ItemT")
ForwardStep = Callable[[Iterator[ItemT], torch.nn.Module], tuple[Tensor, Callable[..., Any]]]


def run_schedule(
    model_chunks: Sequence[torch.nn.Module],
    groups: ProcessGroupCollection,
    forward_step: ForwardStep,
    items: Sequence[ItemT],
    *,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Pass ``items`` (micro-batches) through the model's pipeline, once forward and, in training, once backward.

    Args:
        model_chunks: this rank's; more than one is an interleaved pipeline.
        forward_step: ``(iterator of items, chunk) -> (output, loss function)``, as Megatron-Core's schedules call it.

    Returns:
        What the loss function reported for each item, on the last stage; an empty list elsewhere.
    """
    is_interleaved, is_pipelined = len(model_chunks) > 1, groups.pp.size() > 1
    schedule = get_forward_backward_func(
        pp_size=groups.pp.size(), vp_size=len(model_chunks) if is_interleaved else None
    )
    return schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(items) for _ in model_chunks] if is_interleaved else iter(items),
        model=list(model_chunks),
        num_microbatches=len(items),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        p2p_communicator=P2PCommunicator(groups.pp, get_model_config(model_chunks[0])) if is_pipelined else None,
        pg_collection=groups,
    )


@torch.no_grad()
def forward_only(
    model_chunks: Sequence[torch.nn.Module],
    groups: ProcessGroupCollection,
    inputs: Callable[[ItemT], tuple[Tensor, Tensor]],
    collect: Callable[[ItemT, Tensor], Any],
    items: Sequence[ItemT],
    *,
    seq_length: int,
    micro_batch_size: int,
) -> list[Any]:
    """Return ``collect(item, hidden states)`` of every item, in order, on the last stage; an empty list elsewhere.

    Args:
        inputs: item -> (tokens [b, s], position ids [b, s]).
        collect: gets the hidden states after the final norm, [s, b, h] (this rank's slice under sequence parallelism).
    """

    def step(iterator: Iterator[ItemT], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        item = next(iterator)
        tokens, positions = inputs(item)
        hidden = chunk(tokens, positions, None)
        return hidden, lambda output, non_loss_data=False: collect(item, output)

    return run_schedule(
        model_chunks,
        groups,
        step,
        items,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
