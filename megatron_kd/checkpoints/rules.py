"""Rules between Megatron-Core's tensors and Hugging Face's, each with both directions, and the table of one model's.

A rule names one mcore tensor and the Hugging Face tensors that hold the same numbers. Shapes: h hidden, f ffn, d head
width, a attention heads, g query groups, V the vocabulary without padding.

    Rename        one tensor, another name
    MergeQKV      q [a·d, …], k [g·d, …], v [g·d, …]  ↔  [g · (a/g + 2) · d, …], per group: its q heads, k, v
    MergeGateUp   gate [f, h], up [f, h]              ↔  [2f, h], gate above up
    Vocabulary    [V, h]                              ↔  [padded V, h], zeros below

Rules are pure, keep the dtype and copy no more than they must. Mcore names are those of the local layer spec.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_kd.errors import CheckpointError
from megatron_kd.models.architecture import ModelArchitecture


@dataclass(frozen=True)
class Rule(ABC):
    """One mcore tensor and the Hugging Face tensors that it is made of.

    Both directions may raise RuntimeError where a shape is not the architecture's.
    """

    mcore: str
    hf: tuple[str, ...]

    @abstractmethod
    def to_hf(self, tensor: Tensor, architecture: ModelArchitecture) -> tuple[Tensor, ...]:
        """Convert mcore's tensor to Hugging Face's, in the order of ``hf``."""

    @abstractmethod
    def to_mcore(self, tensors: Sequence[Tensor], architecture: ModelArchitecture, vocab_rows: int) -> Tensor:
        """Convert Hugging Face's tensors, in the order of ``hf``, to mcore's with ``vocab_rows`` ids."""


class Rename(Rule):
    """A tensor under another name."""

    def to_hf(self, tensor: Tensor, architecture: ModelArchitecture) -> tuple[Tensor, ...]:
        return (tensor,)

    def to_mcore(self, tensors: Sequence[Tensor], architecture: ModelArchitecture, vocab_rows: int) -> Tensor:
        return tensors[0]


class MergeQKV(Rule):
    """Three projections in one whose rows are interleaved by query group, so that TP shards whole groups."""

    def to_hf(self, tensor: Tensor, architecture: ModelArchitecture) -> tuple[Tensor, ...]:
        heads = architecture.num_attention_heads // architecture.num_query_groups
        trailing = tensor.shape[1:]
        groups = tensor.reshape(architecture.num_query_groups, heads + 2, architecture.head_dim, *trailing)
        q, k, v = groups[:, :heads], groups[:, heads], groups[:, heads + 1]
        return tuple(part.reshape(-1, *trailing).contiguous() for part in (q, k, v))

    def to_mcore(self, tensors: Sequence[Tensor], architecture: ModelArchitecture, vocab_rows: int) -> Tensor:
        trailing = tensors[0].shape[1:]
        groups, heads = architecture.num_query_groups, architecture.num_attention_heads // architecture.num_query_groups
        shapes = [(groups, count, architecture.head_dim, *trailing) for count in (heads, 1, 1)]
        parts = [part.reshape(shape) for part, shape in zip(tensors, shapes, strict=True)]
        return torch.cat(parts, dim=1).reshape(-1, *trailing)


class MergeGateUp(Rule):
    """SwiGLU's two input projections in one."""

    def to_hf(self, tensor: Tensor, architecture: ModelArchitecture) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for part in tensor.chunk(2, dim=0))

    def to_mcore(self, tensors: Sequence[Tensor], architecture: ModelArchitecture, vocab_rows: int) -> Tensor:
        if tensors[0].shape != tensors[1].shape:
            raise RuntimeError(f"shape {list(tensors[0].shape)} beside {list(tensors[1].shape)}")
        return torch.cat(list(tensors), dim=0)


class Vocabulary(Rule):
    """Rows per vocabulary id: mcore pads them to a multiple, Hugging Face holds as many as there are."""

    def to_hf(self, tensor: Tensor, architecture: ModelArchitecture) -> tuple[Tensor, ...]:
        return (tensor[: architecture.vocab_size].contiguous(),)

    def to_mcore(self, tensors: Sequence[Tensor], architecture: ModelArchitecture, vocab_rows: int) -> Tensor:
        missing = vocab_rows - tensors[0].shape[0]
        if missing < 0:
            raise RuntimeError(f"{tensors[0].shape[0]} rows, more than the model's {vocab_rows}")
        if missing == 0:
            return tensors[0]
        padding = tensors[0].new_zeros(missing, *tensors[0].shape[1:])
        return torch.cat([tensors[0], padding], dim=0)


class TensorTable:
    """Every tensor of one model, by its mcore name, with the rule that converts it.

    Args:
        rules: one per mcore tensor.
        architecture: the model's.
        where: what errors call the model's folder.
    """

    def __init__(self, rules: Sequence[Rule], architecture: ModelArchitecture, where: str):
        self._rules = {rule.mcore: rule for rule in rules}
        self._architecture, self._where = architecture, where

    @property
    def mcore_names(self) -> set[str]:
        """Names of all mcore tensors."""
        return set(self._rules)

    @property
    def hf_names(self) -> set[str]:
        """Names of all Hugging Face tensors."""
        return {name for rule in self._rules.values() for name in rule.hf}

    def hf_names_of(self, name: str) -> tuple[str, ...]:
        """Return the Hugging Face tensors of an mcore tensor, in the order of :meth:`to_hf`."""
        return self._rules[name].hf

    def require_mcore_names(self, names: set[str]) -> None:
        """Raise :class:`CheckpointError`, listing the differences, unless ``names`` are the table's mcore tensors."""
        self._require_same(self.mcore_names, names)

    def require_hf_names(self, names: set[str]) -> None:
        """Raise :class:`CheckpointError`, listing the differences, unless ``names`` are the table's HF tensors.

        Rotary buffers are ignored, and so is the output layer of a tied model.
        """
        ignored = {"lm_head.weight"} if self._architecture.tie_word_embeddings else set()
        found = {name for name in names if name not in ignored and not name.endswith("rotary_emb.inv_freq")}
        self._require_same(self.hf_names, found)

    def to_hf(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the Hugging Face tensors of one whole mcore tensor.

        Raises:
            CheckpointError: its shape is not the architecture's.
        """
        try:
            parts = self._rules[name].to_hf(tensor, self._architecture)
        except (RuntimeError, IndexError) as error:
            raise self._misfit(name, tensor, error) from None
        yield from zip(self._rules[name].hf, parts, strict=True)

    def to_mcore(self, name: str, read: Callable[[str], Tensor], vocab_rows: int) -> Tensor:
        """Return one whole mcore tensor.

        Args:
            read: returns a Hugging Face tensor by name.
            vocab_rows: rows of a vocabulary matrix; those that Hugging Face lacks are zero.

        Raises:
            CheckpointError: a shape is not the architecture's.
        """
        rule = self._rules[name]
        tensors = [read(part) for part in rule.hf]
        try:
            return rule.to_mcore(tensors, self._architecture, vocab_rows)
        except (RuntimeError, IndexError) as error:
            raise self._misfit(rule.hf[0], tensors[0], error) from None

    def _require_same(self, expected: set[str], found: set[str]) -> None:
        faults = []
        for word, names in (("lacks", expected - found), ("has unknown", found - expected)):
            if names:
                shown = ", ".join(f"'{name}'" for name in sorted(names)[:3])
                faults.append(f"{word} {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else ""))
        if faults:
            raise CheckpointError(f"{self._where} does not fit the architecture: it " + "; it ".join(faults))

    def _misfit(self, name: str, tensor: Tensor, error: Exception) -> CheckpointError:
        reason = str(error).splitlines()[0]
        return CheckpointError(
            f"{self._where}: '{name}' of shape {list(tensor.shape)} does not fit the architecture: {reason}"
        )
