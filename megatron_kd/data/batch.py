"""Micro-batches: inputs, labels, the loss mask, and what a training method attaches.

Shapes: b rows (chunks), s = ``seq_length`` positions. Input = chunk[:-1], label = chunk[1:], right-padded. The loss
mask is 1 where the position is real and the *input* is not pad; since pad = eos, the position that predicts eos counts,
the one whose input is eos (it would predict the first token of an unrelated document) does not. Positions are not reset
and attention crosses documents inside a chunk.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_kd.data.chunk_dataset import ChunkDataset


class Payload(Protocol):
    """What a training method attaches to a micro-batch, e.g. how its text was drawn."""

    @property
    def role(self) -> str:
        """Name of the loss that the micro-batch is for, one of those that the method builds."""

    def to(self, device: torch.device | str) -> "Payload":
        """Return the payload with its tensors on another device."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        tokens: inputs, int64 ``[b, s]``.
        labels: int64 ``[b, s]``; the label of position t is the id at t + 1.
        loss_mask: float32 ``[b, s]``, 1 or 0.
        position_ids: int64 ``[b, s]``, 0 … s − 1 in every row.
        chunk_indices: int64 ``[b]``, indices in the dataset.
        key: 63-bit identity, the same on every device and for every process that reads the same chunks.
        payload: what the method attaches; None for a batch of the dataset as it is.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    chunk_indices: torch.Tensor
    key: int
    payload: Payload | None = None

    @property
    def role(self) -> str:
        """Name of the loss that the batch is for; ``main`` without a payload."""
        return "main" if self.payload is None else self.payload.role

    def num_unmasked(self) -> int:
        """Count the positions that contribute to the loss."""
        return int(self.loss_mask.sum().item())

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on another device, its key and payload with it."""
        return dataclasses.replace(
            self,
            tokens=moved(self.tokens, device),
            labels=moved(self.labels, device),
            loss_mask=moved(self.loss_mask, device),
            position_ids=moved(self.position_ids, device),
            chunk_indices=moved(self.chunk_indices, device),
            payload=None if self.payload is None else self.payload.to(device),
        )


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a tensor to another device; the result can be read at once.

    Only a copy from pinned host memory is asynchronous. One from CUDA to the host would leave unfinished memory behind.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and tensor.is_pinned())


def content_key(*ids: np.ndarray) -> int:
    """Hash arrays of ids into a 63-bit number."""
    digest = hashlib.blake2b(digest_size=8)
    for array in ids:
        digest.update(np.ascontiguousarray(array).data)
    return int.from_bytes(digest.digest(), "little") >> 1


def derived_key(key: int, purpose: str) -> int:
    """Return the key of what is made of a micro-batch for ``purpose``, e.g. generated from its prompts."""
    digest = hashlib.blake2b(key.to_bytes(8, "little") + purpose.encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def make_batch(dataset: ChunkDataset, chunk_indices: np.ndarray, seq_length: int, mask_prompt: bool = False) -> Batch:
    """Read chunks and lay them out as a batch on the CPU.

    Args:
        dataset: where the chunks are.
        chunk_indices: ``[b]``.
        seq_length: s; every chunk has at most s + 1 ids.
        mask_prompt: leave out the positions that predict an id of the chunk's prompt; some datasets always do.

    Raises:
        DataError: a chunk is longer, or damaged on disk.
    """
    chunk_indices = np.asarray(chunk_indices, dtype=np.int64)
    ids, lengths = dataset.gather(chunk_indices, seq_length + 1)
    inputs, labels = ids[:, :-1].copy(), ids[:, 1:].copy()
    positions = np.arange(seq_length, dtype=np.int64)
    real = positions < lengths[:, None] - 1
    inputs[~real] = dataset.pad_id  # a short chunk's last id is a label only
    mask = real & (inputs != dataset.pad_id)
    if mask_prompt or dataset.masks_prompts:
        assert dataset.prompt_lengths is not None  # checked where the dataset was opened
        mask &= positions >= dataset.prompt_lengths[chunk_indices][:, None] - 1  # the label at t is the id at t + 1
    return Batch(
        tokens=torch.from_numpy(inputs),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(mask.astype(np.float32)),
        position_ids=torch.from_numpy(np.tile(positions, (len(chunk_indices), 1))),
        chunk_indices=torch.from_numpy(chunk_indices.copy()),
        key=content_key(inputs, labels),
    )


class TextBytes:
    """Counts the UTF-8 bytes of the predicted, unmasked tokens: the denominator of bits per byte.

    Args:
        token_byte_lengths: ``[vocab_size]``, as the dataset has them.
    """

    def __init__(self, token_byte_lengths: np.ndarray) -> None:
        self._lengths = torch.from_numpy(np.asarray(token_byte_lengths, dtype=np.int64))

    def __call__(self, batch: Batch) -> int:
        """Count the bytes of one batch."""
        lengths = self._lengths.to(batch.labels.device)
        return int((lengths[batch.labels] * (batch.loss_mask > 0)).sum().item())
