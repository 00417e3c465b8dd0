"""Batches of generated text, and batches of the dataset beside them.

Shapes: b rows, s = ``seq_length`` positions; position t predicts the id at t + 1.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Sequence

import torch
from torch import Tensor

from megatron_kd.data.batch import Batch


@dataclass(frozen=True)
class Texts:
    """Sequences as they are kept: int64 ``tokens`` [n, s + 1], ``lengths`` [n] and ``prompt_lengths`` [n]."""

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, index: Tensor | slice) -> "Texts":
        """Some of the sequences."""
        return Texts(self.tokens[index], self.lengths[index], self.prompt_lengths[index])

    def to(self, device: torch.device | str) -> "Texts":
        """The same on another device."""
        return Texts(self.tokens.to(device), self.lengths.to(device), self.prompt_lengths.to(device))

    @staticmethod
    def joined(parts: Sequence["Texts"]) -> "Texts":
        """One after another."""
        return Texts(*(torch.cat([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Texts)))


@dataclass(frozen=True)
class GeneratedBatch(Batch):
    """A micro-batch of prompts and responses; the loss mask is 1 where a response's id is predicted.

    Attributes:
        texts: the sequences that it was made of.
        log_probabilities: fp32 [b, s] for each recorded name, of the label at each position when it was drawn; on the
            last pipeline stage, empty elsewhere.
    """

    texts: Texts | None = None
    log_probabilities: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class AuxiliaryBatch(Batch):
    """A micro-batch of the dataset in a step whose main batches are others: the pre-training loss.

    Attributes:
        scale: what its summed loss is multiplied by; it is not counted in the step's denominator.
    """

    scale: float = 0.0


def generated_batch(
    texts: Texts, chunk_indices: Tensor, pad_id: int, log_probabilities: dict[str, Tensor] | None = None
) -> GeneratedBatch:
    """The micro-batch of some sequences.

    Args:
        texts: b of them.
        chunk_indices: int64 [b], where the prompts come from.
        log_probabilities: fp32 [b, s + 1] of each token given those before it.
    """
    ids, positions = texts.tokens, torch.arange(texts.tokens.shape[1] - 1, device=texts.tokens.device)
    ends = texts.lengths.unsqueeze(1) - 1
    mask = (positions >= texts.prompt_lengths.unsqueeze(1) - 1) & (positions < ends)
    return GeneratedBatch(
        tokens=torch.where(positions < ends, ids[:, :-1], pad_id),
        labels=ids[:, 1:].contiguous(),
        loss_mask=mask.float(),
        position_ids=positions.expand(len(texts), -1).contiguous(),
        chunk_indices=chunk_indices,
        texts=texts,
        log_probabilities={name: values[:, 1:] for name, values in (log_probabilities or {}).items()},
    )


def auxiliary_batch(batch: Batch, scale: float) -> AuxiliaryBatch:
    """``batch`` beside others, its summed loss multiplied by ``scale``."""
    return AuxiliaryBatch(**{f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}, scale=scale)
