"""Parts of a generated corpus come back as they were saved; a damaged one is made again."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.generation.generate_corpus import GeneratedParts
from megatron_kd.generation.prompted_texts import Part


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[GeneratedParts]:
    with WorkStore(tmp_path / "out", {"seed": 1, "sampling": {"top_k": 5}}) as store:
        store.claim()
        found = GeneratedParts(store)
        found.save(0, Part(np.arange(40), np.array([15, 25]), np.array([3, 4])))
        yield found


def test_what_is_saved_is_loaded(parts: GeneratedParts) -> None:
    assert parts.is_done(0) and not parts.is_done(1)
    part = parts.load(0)
    assert part.ids.tolist() == list(range(40))
    assert part.lengths.tolist() == [15, 25] and part.prompt_lengths.tolist() == [3, 4]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_part_is_made_again(
    parts: GeneratedParts, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.partial" / "texts-000000.part"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes({"cut": path.read_bytes()[:300], "flipped": bytes(data), "empty": b""}[damage])
    assert not parts.is_done(0) and not path.exists()
    assert "damaged part" in capsys.readouterr().err
