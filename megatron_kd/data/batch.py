"""Chunks to tensors: inputs, labels and the loss mask.

Shapes: b rows (chunks), s = ``seq_length`` positions. Input = chunk[:-1], label = chunk[1:], right-padded. The loss
mask is 1 where the position is real and the *input* is not pad; since pad = eos, the position that predicts eos counts,
the one whose input is eos (it would predict the first token of an unrelated document) does not. Positions are not reset
and attention crosses documents inside a chunk.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from megatron_kd.data.chunk_dataset import ChunkDataset


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        tokens: inputs, int64 ``[b, s]``.
        labels: int64 ``[b, s]``; the label of position t is the id at t + 1.
        loss_mask: float32 ``[b, s]``, 1 or 0.
        position_ids: int64 ``[b, s]``, 0 … s − 1 in every row.
        chunk_indices: int64 ``[b]``, indices in the dataset.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    chunk_indices: torch.Tensor

    def token_hash(self) -> int:
        """A 63-bit hash of the input and label ids: equal batches have equal hashes on any device."""
        digest = hashlib.blake2b(digest_size=8)
        for ids in (self.tokens, self.labels):
            digest.update(np.ascontiguousarray(ids.cpu().numpy()))
        return int.from_bytes(digest.digest(), "little") >> 1

    def num_unmasked(self) -> int:
        """Positions that count in the loss."""
        return int(self.loss_mask.sum().item())

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on another device."""
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            chunk_indices=self.chunk_indices.to(device, non_blocking=True),
        )


def make_batch(dataset: ChunkDataset, chunk_indices: np.ndarray, seq_length: int, mask_prompt: bool = False) -> Batch:
    """Read chunks and lay them out as a batch on the CPU.

    Args:
        dataset: where from.
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
        mask &= positions >= dataset.prompt_lengths[chunk_indices][:, None] - 1  # the label at t is the id at t + 1
    return Batch(
        tokens=torch.from_numpy(inputs),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(mask.astype(np.float32)),
        position_ids=torch.from_numpy(np.tile(positions, (len(chunk_indices), 1))),
        chunk_indices=torch.from_numpy(chunk_indices.copy()),
    )


class TextBytes:
    """Counts the UTF-8 bytes of the predicted, unmasked tokens: the denominator of bits per byte.

    Args:
        token_byte_lengths: ``[vocab_size]``, of the dataset.
    """

    def __init__(self, token_byte_lengths: np.ndarray) -> None:
        self._lengths = torch.from_numpy(np.asarray(token_byte_lengths, dtype=np.int64))

    def __call__(self, batch: Batch) -> int:
        """Bytes in one batch."""
        lengths = self._lengths.to(batch.labels.device)
        return int((lengths[batch.labels] * (batch.loss_mask > 0)).sum().item())
