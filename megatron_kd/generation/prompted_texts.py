"""Texts for the prompts of a dataset, in micro-batches over the data-parallel ranks."""

from dataclasses import dataclass
from typing import Callable, Sequence

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.random_numbers import sequence_seeds
from megatron_kd.generation.decoder import Decoder
from megatron_kd.generation.generate import ModelPolicy, generate
from megatron_kd.generation.generation_config import SamplingConfig
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage, sum_over_group


@dataclass(frozen=True)
class Part:
    """Some texts: ``ids`` int64 one after another, ``lengths`` and ``prompt_lengths`` int64 of each."""

    ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray


def prompts_of(dataset: ChunkDataset, chunks: np.ndarray, prompt_length: int) -> list[np.ndarray]:
    """Return the prompt of each chunk: its own in a dataset that has some, else its first ``prompt_length`` ids.

    A shorter chunk is its own prompt.
    """
    own = dataset.prompt_lengths
    lengths = np.zeros(len(chunks), dtype=np.int64) if own is None else own[chunks]
    return [dataset[int(chunk)][: int(length) or prompt_length] for chunk, length in zip(chunks, lengths)]


@dataclass(frozen=True)
class PromptSource:
    """Text number → prompt.

    Attributes:
        dataset: text n starts as chunk n does.
        num_texts: number of texts.
        prompt_length: ids that a chunk without a prompt of its own gives.
        response_length: the most ids that follow.
        first_id: the one id that every text begins with instead; None begins with chunks.
    """

    dataset: ChunkDataset
    num_texts: int
    prompt_length: int
    response_length: int
    first_id: int | None = None

    def prompts(self, numbers: np.ndarray) -> list[np.ndarray]:
        """Return the ids of each, int64, at least one."""
        if self.first_id is not None:
            return [np.array([self.first_id])] * len(numbers)
        return prompts_of(self.dataset, numbers, self.prompt_length)

    @property
    def max_length(self) -> int:
        """The most ids of a text, prompt included."""
        return self._longest_prompt + self.response_length

    @property
    def _longest_prompt(self) -> int:
        own = self.dataset.prompt_lengths
        if self.first_id is not None:
            return 1
        return self.prompt_length if own is None else int(np.where(own > 0, own, self.prompt_length).max())


@torch.no_grad()
def generate_part(
    model_chunks: Sequence[HiddenStateGPTModel],
    groups: ProcessGroupCollection,
    source: PromptSource,
    numbers: np.ndarray,
    *,
    seed: int,
    sampling: SamplingConfig,
    stop_at_eos: bool,
    micro_batch_size: int,
    device: torch.device,
    on_texts: Callable[[int], object],
) -> Part:
    """Generate the texts ``numbers``, in this order, on every rank. Collective over the ranks that hold the model.

    Each has at most ``response_length`` more ids than its prompt. Prompts of similar length are decoded together.

    Args:
        on_texts: told how many more texts are done, for progress.
    """
    prompts = source.prompts(numbers)
    lengths = np.array([len(prompt) for prompt in prompts])
    table = torch.zeros(len(numbers), source.max_length + 1, dtype=torch.int64, device=device)
    order = np.argsort(lengths, kind="stable")
    batches = np.array_split(order, range(micro_batch_size, len(order), micro_batch_size))
    for rows in batches[groups.dp.rank() :: groups.dp.size()]:
        longest = int(lengths[rows].max()) + source.response_length
        made = generate(
            ModelPolicy(Decoder(model_chunks, groups, len(rows), longest)),
            [prompts[row] for row in rows],
            sequence_seeds(seed, "generate_corpus", numbers[rows]),
            max_length=longest,
            eos_id=source.dataset.eos_id if stop_at_eos else None,
            pad_id=source.dataset.pad_id,
            sampling=sampling,
            device=device,
        )
        if is_last_stage(groups) and groups.tp.rank() == 0:
            limit = made.prompt_lengths + source.response_length
            where = torch.from_numpy(rows).to(device)
            table[where, :longest] = made.tokens
            table[where, -1] = torch.minimum(made.lengths, limit)
        on_texts(min(len(rows) * groups.dp.size(), len(numbers)))
    result = sum_over_group(table, groups.intra_dist_opt).cpu().numpy()
    ends = result[:, -1]
    return Part(np.concatenate([row[:end] for row, end in zip(result, ends)]), ends, lengths.astype(np.int64))
