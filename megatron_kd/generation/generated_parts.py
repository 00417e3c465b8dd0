"""Texts that a generation job has made so far, as parts of its work store (``artefacts/work_store.py``)."""

import io
from dataclasses import dataclass

import numpy as np

from megatron_kd.artefacts.work_store import WorkStore


@dataclass(frozen=True)
class Part:
    """Some texts: ``ids`` int64 one after another, ``lengths`` and ``prompt_lengths`` int64 of each."""

    ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray


class GeneratedParts:
    """The parts of one generated corpus, numbered.

    Args:
        store: of the corpus.
    """

    def __init__(self, store: WorkStore) -> None:
        self.store = store

    def is_done(self, number: int) -> bool:
        """Whether a part is there and whole; a damaged one is to be made again, and a line says so."""
        return self.store.is_whole(_name(number))

    def save(self, number: int, part: Part) -> None:
        """Write a part whole or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, ids=part.ids, lengths=part.lengths, prompt_lengths=part.prompt_lengths)
        self.store.write(_name(number), buffer.getvalue())

    def load(self, number: int) -> Part:
        """Read a part.

        Raises:
            DataError: it is missing or damaged.
        """
        with np.load(io.BytesIO(self.store.read(_name(number)).tobytes())) as file:
            return Part(file["ids"], file["lengths"], file["prompt_lengths"])


def _name(number: int) -> str:
    return f"texts-{number:06d}"
