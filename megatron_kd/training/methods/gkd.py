"""GKD's batches (arXiv 2306.13649, algorithm 1): a step trains on student text, teacher text, or the dataset.

One draw a step, as in TRL's GKDTrainer, for the whole global batch: below λ the student writes, otherwise the teacher
does (``seq_kd``) or the dataset speaks. Gradients do not pass through the sampling.
"""

from typing import Mapping, Sequence

import numpy as np

from megatron_kd.data.batch import Batch
from megatron_kd.data.random_numbers import uniform
from megatron_kd.training.methods.generated_text import PolicyMaker, TextWriter
from megatron_kd.training.methods.method_config import GKDConfig
from megatron_kd.training.methods.source import Place, StepBatches, TextCounts


class GKDSource:
    """Chooses and makes the batches of GKD's steps."""

    needs_heldout_loss = False

    def __init__(
        self,
        config: GKDConfig,
        writer: TextWriter,
        student: PolicyMaker,
        teacher: PolicyMaker | None,
        *,
        seed: int,
        global_batch_size: int,
    ) -> None:
        self._config, self._writer = config, writer
        self._student, self._teacher = student, teacher
        self._seed, self._global_batch_size = seed, global_batch_size
        self.counts = TextCounts()

    def origin(self, position: int) -> str:
        """Whose text the global batch of this number is: ``student``, ``teacher`` or ``dataset``."""
        if uniform(self._seed, "gkd", position) < self._config.student_fraction:
            return "student"
        return "teacher" if self._config.seq_kd else "dataset"

    def batches(self, place: Place, dataset: Sequence[Batch]) -> StepBatches:
        """See :class:`~megatron_kd.training.methods.source.BatchSource`."""
        origin = self.origin(place.position)
        facts = {"origin": origin}
        if origin == "dataset":
            return StepBatches(list(dataset), facts)
        if origin == "student":
            self.counts.student += self._global_batch_size
        else:
            self.counts.teacher += self._global_batch_size
        policy = self._student if origin == "student" else self._teacher
        return StepBatches(list(self._writer.write(policy, dataset, place.position, f"{origin} text")), facts)

    def after_evaluation(self, loss: float) -> None:
        """Of no interest."""

    def state(self) -> Mapping[str, np.ndarray]:
        """The counts; everything else follows from the position."""
        return {"texts": np.array([self.counts.student, self.counts.teacher])}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See :class:`~megatron_kd.training.methods.source.BatchSource`."""
        self.counts = TextCounts(*map(int, state["texts"]))
