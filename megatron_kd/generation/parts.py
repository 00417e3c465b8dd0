"""What a generation job has done so far: one small file a part, renamed into place when it is whole."""

import io
import json
import logging
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.errors import DataError

logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe"
_DAMAGE = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Part:
    """Some texts: ``ids`` int64 one after another, ``lengths`` and ``prompt_lengths`` int64 of each."""

    ids: np.ndarray
    lengths: np.ndarray
    prompt_lengths: np.ndarray


class PartFolder:
    """The parts of one recipe; those of another recipe in the same place are refused.

    Args:
        path: the folder.
        recipe: everything that decides what is made; JSON values.
    """

    def __init__(self, path: Path, recipe: Mapping[str, Any]) -> None:
        self._path = path
        self._recipe: dict[str, Any] = json.loads(json.dumps(recipe))

    def prepare(self) -> None:
        """Make the folder, or take over what an earlier run of the same recipe left.

        Raises:
            DataError: it holds parts of another recipe; says what differs.
        """
        marker = self._path / RECIPE_NAME
        if any(self._path.glob("part-*.npz")):
            difference = self._difference(marker)
            if difference:
                raise DataError(
                    f"{self._path}: holds unfinished work of another recipe ({difference}): go on with the same "
                    "settings, remove the folder, or choose another output"
                )
        self._path.mkdir(parents=True, exist_ok=True)
        write_file(marker, json.dumps(self._recipe, indent=1) + "\n")

    def _difference(self, marker: Path) -> str:
        try:
            found = dict(json.loads(marker.read_text("utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return f"its file '{RECIPE_NAME}' is missing or unreadable"
        return "; ".join(
            f"{name} {found.get(name)} there, {self._recipe.get(name)} now"
            for name in sorted(set(found) | set(self._recipe))
            if found.get(name) != self._recipe.get(name)
        )

    def is_done(self, number: int) -> bool:
        """Whether a part is there and whole; a damaged one is to be made again, which is said."""
        try:
            self.load(number)
        except FileNotFoundError:
            return False
        except _DAMAGE as error:
            logger.info(f"{self._file(number)} is damaged ({error}) and made again")
            return False
        return True

    def save(self, number: int, part: Part) -> None:
        """Write a part whole or not at all."""
        buffer = io.BytesIO()
        np.savez(buffer, ids=part.ids, lengths=part.lengths, prompt_lengths=part.prompt_lengths)
        write_file(self._file(number), buffer.getvalue())

    def load(self, number: int) -> Part:
        """Read a part."""
        with np.load(io.BytesIO(self._file(number).read_bytes())) as file:
            return Part(file["ids"], file["lengths"], file["prompt_lengths"])

    def remove(self) -> None:
        """Remove what there is of this recipe: the dataset is written."""
        if not self._difference(self._path / RECIPE_NAME):
            shutil.rmtree(self._path)

    def _file(self, number: int) -> Path:
        return self._path / f"part-{number:06d}.npz"
