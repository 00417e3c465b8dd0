"""Micro-batches of generated text.

Shapes: b rows, s = ``seq_length`` positions; position t predicts the id at t + 1.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Sequence, cast

import torch
from torch import Tensor

from megatron_kd.data.batch import Batch, derived_key, moved


@dataclass(frozen=True)
class Texts:
    """Sequences of prompt and response: int64 ``tokens`` [n, s + 1], ``lengths`` [n] and ``prompt_lengths`` [n]."""

    tokens: Tensor
    lengths: Tensor
    prompt_lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, index: Tensor | slice) -> "Texts":
        """Select some of the sequences."""
        return Texts(self.tokens[index], self.lengths[index], self.prompt_lengths[index])

    def to(self, device: torch.device | str) -> "Texts":
        """Return the sequences on another device."""
        return Texts(moved(self.tokens, device), moved(self.lengths, device), moved(self.prompt_lengths, device))

    @staticmethod
    def joined(parts: Sequence["Texts"]) -> "Texts":
        """Concatenate sequences."""
        return Texts(*(torch.cat([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Texts)))


@dataclass(frozen=True)
class GeneratedText:
    """Payload of a generated micro-batch: the sequences it holds, and how likely each drawn id was.

    Attributes:
        texts: b sequences.
        log_probabilities: fp32 [b, s] for each recorded name, of the label at each position when it was drawn; on the
            last pipeline stage, empty elsewhere.
    """

    role: ClassVar[str] = "main"
    texts: Texts
    log_probabilities: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "GeneratedText":
        """Return the payload with its tensors on another device."""
        return GeneratedText(
            self.texts.to(device), {name: moved(values, device) for name, values in self.log_probabilities.items()}
        )


def text_of(batch: Batch) -> GeneratedText:
    """Return the payload of a generated micro-batch."""
    return cast(GeneratedText, batch.payload)


def generated_batch(text: GeneratedText, prompts: Batch, pad_id: int, *, purpose: str = "generated text") -> Batch:
    """Lay out sequences as a micro-batch whose loss mask is 1 where an id of a response is predicted.

    Args:
        text: b sequences, which become the payload.
        prompts: the dataset's micro-batch, b rows, whose prompts they answer.
        purpose: what the text is for, part of the key.
    """
    ids, lengths, prompt_lengths = text.texts.tokens, text.texts.lengths, text.texts.prompt_lengths
    positions = torch.arange(ids.shape[1] - 1, device=ids.device)
    ends = lengths.unsqueeze(1) - 1
    mask = (positions >= prompt_lengths.unsqueeze(1) - 1) & (positions < ends)
    return Batch(
        tokens=torch.where(positions < ends, ids[:, :-1], pad_id),
        labels=ids[:, 1:].contiguous(),
        loss_mask=mask.float(),
        position_ids=positions.expand(len(text.texts), -1).contiguous(),
        chunk_indices=prompts.chunk_indices,
        key=derived_key(prompts.key, purpose),
        payload=text,
    )
