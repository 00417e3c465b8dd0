"""What ties a cache to its user: the ids of each chunk, and how the teacher saw them."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Mapping

import numpy as np
from torch import Tensor

from megatron_kd.data.chunk_dataset import MASK_RULE
from megatron_kd.errors import DataError


@dataclass(frozen=True)
class View:
    """How chunks were seen, and under what numbers their distribution was computed."""

    temperature: float
    compute_dtype: str
    mask_rule: str = MASK_RULE
    reset_attention_mask: bool = False
    """Whether documents inside a chunk were kept apart; False is cross-document attention."""
    reset_position_ids: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "View":
        """From what :meth:`to_mapping` gave."""
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return asdict(self)

    def check(self, needed: "View", where: str) -> None:
        """Make sure that what was cached under this view serves one that needs ``needed``.

        Raises:
            DataError: names every value that differs.
        """
        own, other = self.to_mapping(), needed.to_mapping()
        differences = [
            f"{name} {own[name]} where this run has {other[name]}" for name in own if own[name] != other[name]
        ]
        if differences:
            raise DataError(
                f"{where}: was cached with {', '.join(differences)}; cache the teacher again or change the run"
            )


def token_hash(inputs: Tensor, labels: Tensor, positions: int) -> int:
    """A 64-bit hash of a chunk's ``positions + 1`` ids, from the rows [s] that a batch makes of it."""
    ids = np.empty(positions + 1, dtype="<i4")
    ids[:positions] = inputs[:positions].numpy()
    if positions:
        ids[positions] = int(labels[positions - 1])
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")
