"""Rollouts that several steps train on, as a checkpoint keeps them: whole, in the order of the global batch."""

import dataclasses
from typing import Mapping, Sequence

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch
from megatron_kd.parallel.groups import is_last_stage
from megatron_kd.training.methods.batches import GeneratedBatch, Texts
from megatron_kd.training.methods.writer import TextWriter, gather_rows, gather_values, own_row_numbers

RECORDED = ("log_q", "log_p", "log_mixed")
_TEXTS = ("tokens", "lengths", "prompt_lengths")
_PREFIX = "rollout_"
_BLOCK = _PREFIX + "block"


def gathered(made: Sequence[GeneratedBatch], block: int, groups: ProcessGroupCollection) -> dict[str, np.ndarray]:
    """The rollouts of all ranks, the same on every one, and which steps they are for. Collective over the model's
    ranks."""
    texts = gather_rows(Texts.joined([batch.texts for batch in made]), len(made), groups)
    arrays = {_BLOCK: np.array(block)}
    arrays |= {_PREFIX + name: getattr(texts, name).int().cpu().numpy() for name in _TEXTS}
    for name in RECORDED:
        values = gather_values(_recorded(made, name, groups), len(made), groups)
        arrays[_PREFIX + name] = values.cpu().numpy()
    return arrays


def _recorded(made: Sequence[GeneratedBatch], name: str, groups: ProcessGroupCollection) -> Tensor:
    """fp32 [rows, s] from the last pipeline stage, where they are recorded, to all."""
    if is_last_stage(groups):
        values = torch.cat([batch.log_probabilities[name] for batch in made]).float().contiguous()
    else:
        values = torch.cat([torch.empty_like(batch.loss_mask) for batch in made])
    if groups.pp.size() > 1:
        torch.distributed.broadcast(values, group=groups.pp, group_src=groups.pp.size() - 1)
    return values


def restored(
    arrays: Mapping[str, np.ndarray], writer: TextWriter, dataset: Sequence[Batch], groups: ProcessGroupCollection
) -> list[GeneratedBatch]:
    """This rank's micro-batches of :func:`gathered` arrays, in the places of ``dataset``'s."""
    index = own_row_numbers(len(arrays[_PREFIX + "lengths"]), len(dataset), groups)
    texts = Texts(*(torch.from_numpy(arrays[_PREFIX + name]).long() for name in _TEXTS))
    made = writer.cut(texts.rows(index), dataset)
    if not is_last_stage(groups):
        return made
    device = made[0].tokens.device
    recorded = {name: torch.from_numpy(arrays[_PREFIX + name])[index].to(device) for name in RECORDED}
    starts = np.cumsum([0, *(len(batch.chunk_indices) for batch in made)])
    return [
        dataclasses.replace(batch, log_probabilities={name: values[a:b] for name, values in recorded.items()})
        for batch, a, b in zip(made, starts, starts[1:])
    ]


def kept_in(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The rollouts in a checkpoint's state, if there are any."""
    return {name: values for name, values in state.items() if name.startswith(_PREFIX)} or None


def block_of(arrays: Mapping[str, np.ndarray] | None) -> int | None:
    """Which steps kept rollouts are for; None without any."""
    return None if arrays is None else int(arrays[_BLOCK])
