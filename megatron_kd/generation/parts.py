"""What a generation job has done so far: one small file a part, renamed into place when it is whole."""

import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_kd.data.artefact_folder import write_file

RECIPE_NAME = "recipe"


@dataclass(frozen=True)
class Part:
    """Some texts: ``ids`` int64 one after another, ``lengths`` and ``prompt_lengths`` int64 of each."""

    ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray


class PartFolder:
    """The parts of one recipe; those of another recipe in the same place are removed.

    Args:
        path: the folder.
        recipe: identity of what is made.
    """

    def __init__(self, path: Path, recipe: str) -> None:
        self._path = path
        self._recipe = recipe

    def prepare(self) -> None:
        """Make the folder, or take over what an earlier run of the same recipe left."""
        marker = self._path / RECIPE_NAME
        if self._path.exists() and not (marker.is_file() and marker.read_text() == self._recipe):
            shutil.rmtree(self._path)
        self._path.mkdir(parents=True, exist_ok=True)
        write_file(marker, self._recipe)

    def is_done(self, number: int) -> bool:
        """Whether a part is there."""
        return self._file(number).is_file()

    def save(self, number: int, part: Part) -> None:
        """Write a part whole or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, ids=part.ids, lengths=part.lengths, prompt_lengths=part.prompt_lengths)
        write_file(self._file(number), buffer.getvalue())

    def load(self, number: int) -> Part:
        """Read a part."""
        with np.load(self._file(number)) as file:
            return Part(file["ids"], file["lengths"], file["prompt_lengths"])

    def remove(self) -> None:
        """Remove everything: the dataset is written."""
        shutil.rmtree(self._path)

    def _file(self, number: int) -> Path:
        return self._path / f"part-{number:06d}.npz"
