"""DistiLLM's micro-batches (arXiv 2402.03898, §3.2, and the released ``finetune.py``).

    φ        rises by a step whenever the held-out loss has risen by a margin since φ was last moved
    r < thr  or (r < φ and the buffer is not full)   the student generates; its text goes into the buffer
    r < φ                                            text from the buffer
    else                                             the dataset
    thr      φ (1 - step / steps) decreasing | φ / 2 constant | φ step / steps increasing

One draw r per step, for the whole global batch. The buffer holds generated sequences of earlier steps, first in first
out, drawn from without replacement. It spans the whole run and is the same on every rank, so it depends on no layout; a
sequence of 1,025 ids takes 8 KB.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.data.batch import Batch
from megatron_kd.data.random_numbers import sequence_seeds, uniform, uniforms
from megatron_kd.training.methods.generated_text import (
    PolicyMaker,
    RolloutGenerator,
    Texts,
    gather_rows,
    own_rows,
    text_of,
)
from megatron_kd.training.methods.method_builders import MethodParts
from megatron_kd.training.methods.method_table import DistiLLMConfig
from megatron_kd.training.methods.source import Place, StepBatches, TextCounts


def build_source(parts: MethodParts) -> "DistiLLMSource":
    """Build the source of DistiLLM's micro-batches."""
    training = parts.config.training
    return DistiLLMSource(
        parts.settings,
        parts.rollout_generator(),
        parts.student_policy(),
        parts.groups,
        seed=training.seed,
        global_batch_size=training.global_batch_size,
    )


class DistiLLMSource:
    """Chooses and makes the micro-batches of DistiLLM's steps."""

    def __init__(
        self,
        config: DistiLLMConfig,
        generator: RolloutGenerator,
        student: PolicyMaker,
        groups: ProcessGroupCollection,
        *,
        seed: int,
        global_batch_size: int,
    ) -> None:
        self._config, self._generator, self._student, self._groups = config, generator, student, groups
        self._seed, self._global_batch_size = seed, global_batch_size
        self.counts = TextCounts()
        self.buffer = ReplayBuffer(config.replay_capacity, seed)
        self.threshold = config.initial_threshold
        self._reference_loss: float | None = None

    def fresh_probability(self, place: Place) -> float:
        """Return the probability of new text at a step."""
        done = place.step / place.steps
        factors = {"decreasing": 1 - done, "constant": 0.5, "increasing": done}
        return self.threshold * factors[self._config.replay_schedule]

    def origin(self, place: Place) -> str:
        """Return whose text a step trains on: ``student``, ``replay`` or ``dataset``."""
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
            return StepBatches(self._generator.as_micro_batches(own, dataset), facts)
        self.counts.student += self._global_batch_size
        made = self._generator.generate(self._student, dataset, place.position, "student text")
        texts = Texts.joined([text_of(batch).texts for batch in made])
        self.buffer.push(gather_rows(texts, len(made), self._groups))
        return StepBatches(made, facts)

    def after_evaluation(self, loss: float) -> None:
        """Raise φ if the held-out loss has risen."""
        if self._reference_loss is None:
            self._reference_loss = loss
        elif loss >= self._reference_loss + self._config.loss_margin:
            self.threshold = min(1.0, self.threshold + self._config.threshold_step)
            self._reference_loss = loss

    def state(self) -> Mapping[str, np.ndarray]:
        """Return the counts, φ, the held-out loss at which φ was last moved, and the buffer."""
        reference = np.nan if self._reference_loss is None else self._reference_loss
        return {
            "texts": self.counts.to_array(),
            "threshold": np.array([self.threshold, reference]),
            **self.buffer.state(),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """See :class:`~megatron_kd.training.methods.source.BatchSource`."""
        self.counts = TextCounts.from_array(state["texts"])
        self.threshold, reference = map(float, state["threshold"])
        self._reference_loss = None if np.isnan(reference) else reference
        self.buffer.restore(state)


class ReplayBuffer:
    """A queue of at most ``capacity`` sequences.

    Args:
        seed: of the draws.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self._capacity, self._seed = capacity, seed
        self._texts: Texts | None = None

    def __len__(self) -> int:
        return 0 if self._texts is None else len(self._texts)

    @property
    def is_full(self) -> bool:
        """Whether the next push drops something."""
        return len(self) >= self._capacity

    def push(self, texts: Texts) -> None:
        """Add sequences; the oldest ones make room."""
        texts = texts.to("cpu")
        whole = texts if self._texts is None else Texts.joined([self._texts, texts])
        self._texts = whole.rows(slice(max(0, len(whole) - self._capacity), None))

    def draw(self, count: int, global_batch: int) -> Texts:
        """Return ``count`` different sequences; which ones is a function of the seed and ``global_batch``.

        Raises:
            ValueError: there are fewer.
        """
        if self._texts is None or count > len(self):
            raise ValueError(f"{count} sequences asked of a buffer of {len(self)}")
        seeds = sequence_seeds(self._seed, "replay buffer", np.array([global_batch]))
        order = torch.from_numpy(np.argsort(uniforms(seeds, np.arange(len(self))), kind="stable"))
        return self._texts.rows(order[:count])

    def state(self) -> Mapping[str, np.ndarray]:
        """Return what a checkpoint keeps."""
        if self._texts is None:
            return {}
        texts = self._texts
        return {
            "replay_tokens": texts.tokens.int().numpy(),
            "replay_lengths": texts.lengths.int().numpy(),
            "replay_prompt_lengths": texts.prompt_lengths.int().numpy(),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a checkpoint's state."""
        self._texts = None
        if "replay_tokens" in state:
            names = ("replay_tokens", "replay_lengths", "replay_prompt_lengths")
            self._texts = Texts(*(torch.from_numpy(np.asarray(state[name])).long() for name in names))
