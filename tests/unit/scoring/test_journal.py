"""The journal gives back the scores that were whole when they were written; see artefacts/test_work_store.py."""

from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.errors import DataError
from megatron_kd.scoring.journal import ScoreJournal
from megatron_kd.scoring.micro_batches import MicroBatchPlan
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset


@pytest.fixture
def plan(tmp_path: Path) -> MicroBatchPlan:
    """9 chunks in units of 2; the last has one."""
    dataset = write_chunk_dataset(tmp_path / "data", [np.arange(1, 9)] * 9, plain_tokenizer_info(10), 16)
    return MicroBatchPlan(dataset, 1, chunks_per_unit=2)


def unit_scores(unit: int) -> np.ndarray:
    return np.array([unit + 0.25, np.nan], dtype=np.float32)[: 1 if unit == 4 else 2]


def journal(folder: Path, plan: MicroBatchPlan) -> tuple[WorkStore, ScoreJournal]:
    store = WorkStore(folder / "scores", {"model": "m"})
    store.claim()
    return store, ScoreJournal(store, plan)


def test_units_of_several_starts_add_up(tmp_path: Path, plan: MicroBatchPlan) -> None:
    store, first = journal(tmp_path, plan)
    with store:
        for unit in (3, 0, 4):
            first.add(unit, unit_scores(unit))
    store, second = journal(tmp_path, plan)
    with store:
        assert second.done_units() == [0, 3, 4]
        with pytest.raises(DataError, match="4 of 9 chunks have no score, the first is chunk 2"):
            second.gather()
        for unit in (1, 2):
            second.add(unit, unit_scores(unit))
        np.testing.assert_array_equal(second.gather(), np.concatenate([unit_scores(unit) for unit in range(5)]))


def test_a_flipped_bit_never_gives_a_wrong_score(tmp_path: Path, plan: MicroBatchPlan) -> None:
    store, writer = journal(tmp_path, plan)
    with store:
        for unit in (3, 0, 4):
            writer.add(unit, unit_scores(unit))
    (path,) = store.folder.glob("*.journal")
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        store, reader = journal(tmp_path, plan)
        with store:
            done = reader.done_units()
            assert set(done) < {0, 3, 4}
            for unit in set(range(5)) - set(done):
                reader.add(unit, unit_scores(unit))
            np.testing.assert_array_equal(reader.gather(), np.concatenate([unit_scores(unit) for unit in range(5)]))
        for extra in set(store.folder.glob("*.journal")) - {path}:
            extra.unlink()
