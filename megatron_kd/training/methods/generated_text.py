"""Generated text: responses to the prompts of a step's micro-batches, and the micro-batches made of them.

A sequence's seed is made of the run's seed, what the text is for, and the sequence's place in the run (global batch,
row), so the text is the same under every layout and micro-batch size, and after a resume. Shapes: b rows,
s = ``seq_length`` positions; position t predicts the id at t + 1.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Callable, ClassVar, Sequence, cast

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_kd.data.batch import Batch, derived_key, moved
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.random_numbers import sequence_seeds
from megatron_kd.errors import ConfigError
from megatron_kd.generation.generate import Generated, Policy, generate
from megatron_kd.generation.prompted_texts import prompts_of
from megatron_kd.training.distillation_config import RolloutConfig


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
        log_probabilities: for each recorded name fp32 [b, s], of the label at each position when it was drawn; empty
            before the last pipeline stage.
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


PolicyMaker = Callable[[int, int], Policy]
"""(sequences, most tokens of each) → a policy with empty caches."""


class RolloutGenerator:
    """Generates responses to a dataset's prompts.

    Args:
        dataset: gives the prompts.
        seq_length: s; a sequence has at most s + 1 ids.

    Raises:
        ConfigError: prompts would fill the sequences.
    """

    def __init__(
        self,
        config: RolloutConfig,
        dataset: ChunkDataset,
        groups: ProcessGroupCollection,
        *,
        seq_length: int,
        seed: int,
        device: torch.device,
    ) -> None:
        if dataset.prompt_lengths is None and config.prompt_length > seq_length:
            raise ConfigError(
                f"distillation.rollout.prompt_length {config.prompt_length} leaves no room for a response in the "
                f"{seq_length + 1} ids of a chunk: lower it"
            )
        self._config, self._dataset, self._groups = config, dataset, groups
        self._width = seq_length + 1
        self._seed, self._device = seed, device

    @property
    def pad_id(self) -> int:
        """The id to the right of a sequence."""
        return self._dataset.pad_id

    def response_places(self, texts: Texts) -> int:
        """Count the places that the responses to these prompts could fill, however long they have become."""
        return sum(self._limit(length) - length for length in texts.prompt_lengths.tolist())

    def generate(self, policy: PolicyMaker, batches: Sequence[Batch], global_batch: int, stream: str) -> list[Batch]:
        """Generate one micro-batch for each of this rank's. Collective over the model's ranks.

        Args:
            global_batch: its number in the run.
            stream: what the text is for.
        """
        chunks = torch.cat([batch.chunk_indices for batch in batches]).cpu().numpy()
        prompts = prompts_of(self._dataset, chunks, self._config.prompt_length)
        seeds = sequence_seeds(self._seed, stream, self._row_numbers(batches, global_batch))
        parts, records = [], []
        for start in range(0, len(prompts), self._config.rows):
            rows = slice(start, start + self._config.rows)
            texts, recorded = self._generate(policy, prompts[rows], seeds[rows])
            parts.append(texts)
            records.append(recorded)
        texts = Texts.joined(parts)
        recorded = {name: torch.cat([part[name] for part in records]) for name in records[0]}
        return self._cut(texts, recorded, batches, stream)

    def as_micro_batches(self, texts: Texts, batches: Sequence[Batch]) -> list[Batch]:
        """Cut sequences, as many as ``batches`` have rows, into micro-batches that replace them."""
        return self._cut(texts.to(self._device), {}, batches, "replayed text")

    def _cut(self, texts: Texts, recorded: dict[str, Tensor], batches: Sequence[Batch], purpose: str) -> list[Batch]:
        made, start = [], 0
        for batch in batches:
            rows = slice(start, start + len(batch.chunk_indices))
            start = rows.stop
            probabilities = {name: values[rows, 1:] for name, values in recorded.items()}
            text = GeneratedText(texts.rows(rows), probabilities)
            made.append(generated_batch(text, batch, self.pad_id, purpose=purpose))
        return made

    def _generate(
        self, policy: PolicyMaker, prompts: Sequence[np.ndarray], seeds: np.ndarray
    ) -> tuple[Texts, dict[str, Tensor]]:
        longest = max(self._limit(len(prompt)) for prompt in prompts)
        made: Generated = generate(
            policy(len(prompts), longest),
            prompts,
            seeds,
            max_length=longest,
            eos_id=self._dataset.eos_id,
            pad_id=self.pad_id,
            sampling=self._config.sampling,
            device=self._device,
        )
        limits = torch.tensor([self._limit(len(prompt)) for prompt in prompts], device=self._device)
        lengths = torch.minimum(made.lengths, limits)
        tokens = self._widened(made.tokens, self.pad_id)
        within = torch.arange(self._width, device=self._device) < lengths.unsqueeze(1)
        recorded = {name: self._widened(values, 0.0) * within for name, values in made.log_probabilities.items()}
        return Texts(torch.where(within, tokens, self.pad_id), lengths, made.prompt_lengths), recorded

    def _widened(self, values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, self._width - values.shape[1]), value=fill)

    def _limit(self, prompt_length: int) -> int:
        response = self._config.response_length
        return self._width if response is None else min(self._width, prompt_length + response)

    def _row_numbers(self, batches: Sequence[Batch], global_batch: int) -> np.ndarray:
        """Number this rank's rows in the run: micro-batch i of rank r starts at row (i · ranks + r) · b."""
        ranks, rank, rows = self._groups.dp.size(), self._groups.dp.rank(), len(batches[0].chunk_indices)
        first = (np.arange(len(batches)) * ranks + rank) * rows
        return (first[:, None] + np.arange(rows)).ravel() + global_batch * (len(batches) * ranks * rows)


def gather_rows(texts: Texts, micro_batches: int, groups: ProcessGroupCollection) -> Texts:
    """Return all data-parallel ranks' sequences in the order of the global batch. Collective over the dp group."""
    own = torch.cat([texts.tokens, texts.lengths.unsqueeze(1), texts.prompt_lengths.unsqueeze(1)], dim=1)
    together = gather_values(own, micro_batches, groups)
    return Texts(together[:, :-2], together[:, -2], together[:, -1])


def gather_values(own: Tensor, micro_batches: int, groups: ProcessGroupCollection) -> Tensor:
    """Return all data-parallel ranks' rows [n, k] in the order of the global batch. Collective over the dp group."""
    ranks = groups.dp.size()
    if ranks == 1:
        return own
    everyone = [torch.empty_like(own) for _ in range(ranks)]
    torch.distributed.all_gather(everyone, own.contiguous(), group=groups.dp)
    return torch.stack([part.view(micro_batches, -1, own.shape[1]) for part in everyone], dim=1).flatten(0, 2)


def own_rows(texts: Texts, micro_batches: int, groups: ProcessGroupCollection) -> Texts:
    """Select this rank's sequences of a global batch; the inverse of :func:`gather_rows`."""
    return texts.rows(own_row_numbers(len(texts), micro_batches, groups).to(texts.tokens.device))


def own_row_numbers(rows: int, micro_batches: int, groups: ProcessGroupCollection) -> Tensor:
    """Return the numbers of this rank's rows of a global batch."""
    return torch.arange(rows).view(micro_batches, groups.dp.size(), -1)[:, groups.dp.rank()].flatten()
