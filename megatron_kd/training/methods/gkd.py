"""GKD's micro-batches (arXiv 2306.13649, algorithm 1): a step trains on student text, teacher text, or the dataset.

One draw per step for the whole global batch: below λ the student generates, otherwise the teacher does (``seq_kd``), or
the step takes the dataset's. TRL's GKDTrainer draws once per micro-batch and process instead. Gradients do not pass
through the sampling.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_kd.data.batch import Batch
from megatron_kd.data.random_numbers import uniform
from megatron_kd.training.methods.generated_text import PolicyMaker, RolloutGenerator
from megatron_kd.training.methods.method_builders import MethodParts
from megatron_kd.training.methods.method_table import GKDConfig
from megatron_kd.training.methods.source import Place, StepBatches, TextCounts


def build_source(parts: MethodParts) -> "GKDSource":
    """Build the source of GKD's micro-batches."""
    settings: GKDConfig = parts.settings
    return GKDSource(
        settings,
        parts.rollout_generator(),
        {"student": parts.student_policy()} | ({"teacher": parts.teacher_policy()} if settings.seq_kd else {}),
        seed=parts.config.training.seed,
        global_batch_size=parts.config.training.global_batch_size,
    )


class GKDSource:
    """Chooses and makes the micro-batches of GKD's steps.

    Args:
        policies: by origin: ``student``, and with ``seq_kd`` ``teacher``.
    """

    def __init__(
        self,
        config: GKDConfig,
        generator: RolloutGenerator,
        policies: Mapping[str, PolicyMaker],
        *,
        seed: int,
        global_batch_size: int,
    ) -> None:
        self._config, self._generator, self._policies = config, generator, policies
        self._seed, self._global_batch_size = seed, global_batch_size
        self.counts = TextCounts()

    def origin(self, position: int) -> str:
        """Return whose text the global batch of this number is: ``student``, ``teacher`` or ``dataset``."""
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
        made = self._generator.generate(self._policies[origin], dataset, place.position, f"{origin} text")
        return StepBatches(made, facts)

    def after_evaluation(self, loss: float) -> None:
        """Do nothing: GKD does not depend on the held-out loss."""

    def state(self) -> Mapping[str, np.ndarray]:
        """Return the counts; everything else follows from the position."""
        return {"texts": self.counts.to_array()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See :class:`~megatron_kd.training.methods.source.BatchSource`."""
        self.counts = TextCounts.from_array(state["texts"])
