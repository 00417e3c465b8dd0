"""Exposure bias: how much faster a student strays from its teacher on its own text than on the teacher's.

The excess accumulated error of Arora et al. 2022 (arXiv 2204.01171), as MiniLLM (arXiv 2306.08543, §4) uses it, in %:

    ExAccErr(l) = (R(l) - l ε(l)) / (l ε(l)) · 100
    R(l)   sum over the first l places of E[KL(p ‖ q)] on text that the student writes
    ε(l)   the mean over those places of E[KL(p ‖ q)] on text that the teacher writes

Text goes on to the full length after an end of document, so that every place counts the same number of times. The KL is
taken over the whole vocabulary, not at the drawn token. Both models are laid out alike.
"""

from dataclasses import dataclass
from typing import Callable, Iterator, Sequence

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.random_numbers import sequence_seeds
from megatron_kd.errors import DataError
from megatron_kd.generation.decoder import Decoder
from megatron_kd.generation.generate import ModelPolicy, generate
from megatron_kd.generation.sampling import SamplingConfig
from megatron_kd.losses import DenseKnowledge, DistillationObjective, ForwardKL, linear_distillation_loss
from megatron_kd.models.gpt import HiddenStateGPTModel
from megatron_kd.parallel.groups import is_last_stage, sum_over_group
from megatron_kd.parallel.schedule import forward_only

Chunks = Sequence[HiddenStateGPTModel]
FORWARD_KL = DistillationObjective(lm_weight=0.0, kd_weight=1.0, divergence=ForwardKL())


@dataclass(frozen=True)
class ExposureConfig:
    """The ``exposure.*`` keys of evaluation."""

    num_texts: int = 256
    prompt_length: int = 64
    response_length: int = 64
    """l of ExAccErr(l)."""
    seed: int = 10

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        for name in ("num_texts", "prompt_length", "response_length"):
            if getattr(self, name) < 1:
                yield f"'exposure.{name}' must be at least 1, not {getattr(self, name)}"


@dataclass(frozen=True)
class ExposureBias:
    """Mean KL(p ‖ q) of a token, nats, on text of the student's and of the teacher's."""

    on_student_text: float
    on_teacher_text: float

    @property
    def excess_accumulated_error(self) -> float:
        """ExAccErr at the full length, in %; 0 for a student that is its teacher."""
        if self.on_teacher_text <= 0:
            return 0.0
        return 100.0 * (self.on_student_text / self.on_teacher_text - 1.0)


@torch.no_grad()
def exposure_bias(
    student: Chunks,
    teacher: Chunks,
    groups: ProcessGroupCollection,
    dataset: ChunkDataset,
    config: ExposureConfig,
    *,
    device: torch.device,
    micro_batch_size: int,
) -> ExposureBias:
    """Equal on all ranks. Collective over the ranks that hold the models.

    Raises:
        DataError: no chunk is as long as a prompt.
    """
    numbers = np.flatnonzero(dataset.lengths >= config.prompt_length)[: config.num_texts]
    if not len(numbers):
        raise DataError(
            f"{dataset.path}: no chunk has the {config.prompt_length} ids of a prompt: lower exposure.prompt_length"
        )
    batches = [numbers[start : start + micro_batch_size] for start in range(0, len(numbers), micro_batch_size)]
    sums = torch.zeros(2, 2, dtype=torch.float64, device=device)
    for rows in batches[groups.dp.rank() :: groups.dp.size()]:
        for row, writer in enumerate((student, teacher)):
            text = _write(writer, groups, dataset, rows, config, device)
            kl = _summed_kl(student, teacher, groups, text, config)
            if kl is not None and groups.tp.rank() == 0:
                sums[row] += torch.stack([kl, kl.new_tensor(len(rows) * config.response_length)]).to(sums)
    totals = sum_over_group(sums, groups.intra_dist_opt).tolist()
    return ExposureBias(*(total / max(1.0, count) for total, count in totals))


def _write(
    writer: Chunks,
    groups: ProcessGroupCollection,
    dataset: ChunkDataset,
    rows: np.ndarray,
    config: ExposureConfig,
    device: torch.device,
) -> Tensor:
    length = config.prompt_length + config.response_length
    decoder = Decoder(writer, groups, len(rows), length, dataset.vocab_size)
    made = generate(
        ModelPolicy(decoder),
        [dataset[int(row)][: config.prompt_length] for row in rows],
        sequence_seeds(config.seed, "exposure bias", rows),
        max_length=length,
        eos_id=None,
        pad_id=dataset.pad_id,
        sampling=SamplingConfig(),
        device=device,
    )
    return made.tokens


def _summed_kl(
    student: Chunks, teacher: Chunks, groups: ProcessGroupCollection, text: Tensor, config: ExposureConfig
) -> Tensor | None:
    """Sum of KL(p ‖ q) over the responses; None before the last stage."""
    inputs = text[:, :-1]
    if groups.tp.size() > 1 and student[-1].config.sequence_parallel:
        inputs = torch.nn.functional.pad(inputs, (0, -inputs.shape[1] % groups.tp.size()))
    positions = torch.arange(inputs.shape[1], device=text.device).expand_as(inputs)
    weights = ((positions >= config.prompt_length - 1) & (positions < text.shape[1] - 1)).float()

    def last_hidden(chunks: Chunks, collect: Callable[[Tensor], Tensor]) -> Tensor | None:
        found = forward_only(
            chunks, groups, lambda item: item, lambda _, hidden: collect(hidden), [(inputs, positions)],
            seq_length=inputs.shape[1], micro_batch_size=len(inputs),
        )  # fmt: skip
        return found[0] if is_last_stage(groups) else None

    known = last_hidden(teacher, lambda hidden: _whole(hidden, teacher, groups))

    def kl(hidden: Tensor) -> Tensor:
        return linear_distillation_loss(
            hidden,
            student[-1].output_head(),
            torch.zeros_like(inputs).t().reshape(-1),
            weights.t().reshape(-1),
            FORWARD_KL,
            DenseKnowledge(known.flatten(0, 1), teacher[-1].output_head()),
            tp_group=groups.tp,
            sequence_parallel=student[-1].config.sequence_parallel,
        ).kd_sum

    return last_hidden(student, kl)


def _whole(hidden: Tensor, chunks: Chunks, groups: ProcessGroupCollection) -> Tensor:
    if chunks[-1].config.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, group=groups.tp)
    return hidden
