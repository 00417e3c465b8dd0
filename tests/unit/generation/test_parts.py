"""Parts of a generation job: taken over by the same recipe, refused by another, made again when damaged."""

from pathlib import Path

import numpy as np
import pytest

from megatron_kd.errors import DataError
from megatron_kd.generation.parts import Part, PartFolder


@pytest.fixture
def parts(tmp_path: Path) -> PartFolder:
    folder = PartFolder(tmp_path / "out.parts", {"seed": 1, "sampling": {"top_k": 5}})
    folder.prepare()
    folder.save(0, Part(np.arange(40), np.array([15, 25]), np.array([3, 4])))
    return folder


def test_the_same_recipe_goes_on(parts: PartFolder, tmp_path: Path) -> None:
    again = PartFolder(tmp_path / "out.parts", {"sampling": {"top_k": 5}, "seed": 1})
    again.prepare()
    assert again.is_done(0) and not again.is_done(1)
    assert again.load(0).ids.tolist() == list(range(40))


def test_another_recipe_is_refused_and_removes_nothing(parts: PartFolder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="seed 1 there, 2 now.*choose another output"):
        PartFolder(tmp_path / "out.parts", {"seed": 2, "sampling": {"top_k": 5}}).prepare()
    assert parts.is_done(0)
    (tmp_path / "out.parts" / "recipe").write_text("0123")
    with pytest.raises(DataError, match="unreadable"):
        parts.prepare()
    assert parts.is_done(0)


def test_removal_leaves_the_parts_of_another_recipe(parts: PartFolder, tmp_path: Path) -> None:
    PartFolder(tmp_path / "out.parts", {"seed": 2, "sampling": {"top_k": 5}}).remove()
    assert parts.is_done(0)
    parts.remove()
    assert not (tmp_path / "out.parts").exists()
    parts.remove()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_part_is_made_again(
    parts: PartFolder, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.parts" / "part-000000.npz"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes({"cut": path.read_bytes()[:300], "flipped": bytes(data), "empty": b""}[damage])
    assert not parts.is_done(0)
    assert "damaged" in capsys.readouterr().err
