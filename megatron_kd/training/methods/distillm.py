"""DistiLLM's batches (arXiv 2402.03898, §3.2, and the released ``finetune.py``).

    φ        rises by a step whenever the held-out loss has risen by a margin since it was last moved
    r < thr  or (r < φ and the buffer is not full)   the student writes; its text goes into the buffer
    r < φ                                            text from the buffer
    else                                             the dataset
    thr      φ (1 - step / steps) decreasing | φ / 2 constant | φ step / steps increasing

One draw r a step, for the whole global batch.
"""

from typing import Mapping, Sequence

import numpy as np
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.data.batch import Batch
from megatron_kd.generation.random_numbers import uniform
from megatron_kd.training.methods.batches import Texts
from megatron_kd.training.methods.config import DistiLLMConfig
from megatron_kd.training.methods.replay_buffer import ReplayBuffer
from megatron_kd.training.methods.source import Place, StepBatches, TextCounts
from megatron_kd.training.methods.writer import PolicyMaker, TextWriter, gather_rows, own_rows


class DistiLLMSource:
    """Chooses and makes the batches of DistiLLM's steps."""

    needs_heldout_loss = True

    def __init__(
        self,
        config: DistiLLMConfig,
        writer: TextWriter,
        student: PolicyMaker,
        groups: ProcessGroupCollection,
        *,
        seed: int,
        global_batch_size: int,
    ) -> None:
        self._config, self._writer, self._student, self._groups = config, writer, student, groups
        self._seed, self._global_batch_size = seed, global_batch_size
        self.counts = TextCounts()
        self.buffer = ReplayBuffer(config.replay_capacity, seed)
        self.threshold = config.initial_threshold
        self._reference_loss: float | None = None

    def fresh_probability(self, place: Place) -> float:
        """The probability of new text at a step."""
        done = place.step / place.steps
        factors = {"decreasing": 1 - done, "constant": 0.5, "increasing": done}
        return self.threshold * factors[self._config.replay_schedule]

    def origin(self, place: Place) -> str:
        """Whose text a step trains on: ``student``, ``replay`` or ``dataset``."""
        draw = uniform(self._seed, "distillm", place.position)
        if draw < self.fresh_probability(place) or (draw < self.threshold and not self.buffer.is_full):
            return "student"
        return "replay" if draw < self.threshold else "dataset"

    def batches(self, place: Place, dataset: Sequence[Batch]) -> StepBatches:
        """See :class:`~megatron_kd.training.methods.source.BatchSource`."""
        origin = self.origin(place)
        facts = {"origin": origin, "threshold": self.threshold, "replay_size": len(self.buffer)}
        if origin == "dataset":
            return StepBatches(list(dataset), facts)
        if origin == "replay":
            drawn = self.buffer.draw(self._global_batch_size, place.position)
            own = own_rows(drawn, len(dataset), self._groups)
            return StepBatches(list(self._writer.cut(own, dataset)), facts)
        self.counts.student += self._global_batch_size
        made = self._writer.write(self._student, dataset, place.position, "student text")
        texts = Texts.joined([batch.texts for batch in made])
        self.buffer.push(gather_rows(texts, len(made), self._groups))
        return StepBatches(list(made), facts)

    def after_evaluation(self, loss: float) -> None:
        """Raise φ if the held-out loss has risen."""
        if self._reference_loss is None:
            self._reference_loss = loss
        elif loss >= self._reference_loss + self._config.loss_margin:
            self.threshold = min(1.0, self.threshold + self._config.threshold_step)
            self._reference_loss = loss

    def state(self) -> Mapping[str, np.ndarray]:
        """Counts, φ, the loss that it was last moved at, the buffer."""
        reference = np.nan if self._reference_loss is None else self._reference_loss
        return {
            "texts": np.array([self.counts.student, self.counts.teacher]),
            "threshold": np.array([self.threshold, reference]),
            **self.buffer.state(),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See :class:`~megatron_kd.training.methods.source.BatchSource`."""
        self.counts = TextCounts(*map(int, state["texts"]))
        self.threshold, reference = map(float, state["threshold"])
        self._reference_loss = None if np.isnan(reference) else reference
        self.buffer.restore(state)
