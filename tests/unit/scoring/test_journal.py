"""The journal gives back what was whole when it was written, whatever is cut or flipped."""

from pathlib import Path

import numpy as np
import pytest

from megatron_kd.errors import DataError
from megatron_kd.scoring.journal import ScoreJournal


def journal(folder: Path, chunks: int = 10) -> ScoreJournal:
    found = ScoreJournal(folder / "scores", chunks)
    found.claim("recipe")
    return found


def unit_scores(unit: int) -> np.ndarray:
    return np.array([unit + 0.25, np.nan], dtype=np.float32)


def filled(folder: Path) -> Path:
    writer = journal(folder)
    for unit in (3, 0, 4):
        writer.add(unit, 2 * unit, unit_scores(unit), 1.0)
    writer.close()
    (part,) = writer.folder.glob("*.part")
    return part


def test_units_of_several_starts_add_up(tmp_path: Path) -> None:
    filled(tmp_path)
    second = journal(tmp_path)
    assert second.done_units() == [0, 3, 4]
    with pytest.raises(DataError, match="4 of 10 chunks have no score, the first is chunk 2"):
        second.gather()
    for unit in (1, 2):
        second.add(unit, 2 * unit, unit_scores(unit), 1.0)
    np.testing.assert_array_equal(second.gather(), np.concatenate([unit_scores(unit) for unit in range(5)]))
    second.close()
    second.remove()
    assert not second.folder.exists()


def test_cut_at_any_byte(tmp_path: Path) -> None:
    part = filled(tmp_path)
    whole = part.read_bytes()
    one = len(whole) // 3
    for size in range(len(whole)):
        part.write_bytes(whole[:size])
        reader = journal(tmp_path)
        assert reader.done_units() == sorted([3, 0, 4][: size // one])
        reader.close()


def test_a_flipped_bit_loses_a_unit_and_never_gives_a_wrong_score(tmp_path: Path) -> None:
    part = filled(tmp_path)
    whole = part.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        part.write_bytes(bytes(damaged))
        reader = journal(tmp_path)
        assert len(reader.done_units()) < 3 and set(reader.done_units()) < {0, 3, 4}
        for unit, first, scores, _ in reader._records():
            assert first == 2 * unit
            np.testing.assert_array_equal(scores, unit_scores(unit))
        reader.close()


def test_another_recipe_and_another_writer_are_refused(tmp_path: Path) -> None:
    first = journal(tmp_path)
    with pytest.raises(DataError, match="another run is writing"):
        ScoreJournal(tmp_path / "scores", 10).claim("recipe")
    first.close()
    with pytest.raises(DataError, match="recipe recipe, now other"):
        ScoreJournal(tmp_path / "scores", 10).claim("other")
