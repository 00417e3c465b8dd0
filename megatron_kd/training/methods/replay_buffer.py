"""Generated sequences of earlier steps, first in first out, drawn from without replacement.

It holds the sequences of the whole run and is the same on every rank, so it depends on no layout: a sequence of 1,025
ids takes 8 KB.
"""

from typing import Mapping

import numpy as np
import torch

from megatron_kd.generation.random_numbers import sequence_seeds, uniforms
from megatron_kd.training.methods.batches import Texts


class ReplayBuffer:
    """At most ``capacity`` sequences; ``seed`` is that of the draws."""

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
        """``count`` different sequences; which ones is a function of the seed and ``global_batch``.

        Raises:
            ValueError: there are fewer.
        """
        if count > len(self):
            raise ValueError(f"{count} sequences asked of a buffer of {len(self)}")
        seeds = sequence_seeds(self._seed, "replay buffer", np.array([global_batch]))
        order = torch.argsort(uniforms(seeds, np.arange(len(self))), stable=True)
        return self._texts.rows(order[:count])

    def state(self) -> Mapping[str, np.ndarray]:
        """What a checkpoint keeps."""
        if self._texts is None:
            return {}
        texts = self._texts
        return {
            "replay_tokens": texts.tokens.int().numpy(),
            "replay_lengths": texts.lengths.int().numpy(),
            "replay_prompt_lengths": texts.prompt_lengths.int().numpy(),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a checkpoint's state."""
        self._texts = None
        if "replay_tokens" in state:
            names = ("replay_tokens", "replay_lengths", "replay_prompt_lengths")
            self._texts = Texts(*(torch.from_numpy(np.asarray(state[name])).long() for name in names))
