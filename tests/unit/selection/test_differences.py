"""r from two score files: reference minus teacher, in the dataset's order; files that do not belong together."""

from pathlib import Path

import numpy as np
import pytest

from megatron_kd.config import from_mapping
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.scoring.score_file import write_score_file
from megatron_kd.selection.differences import Differences, measured_differences
from megatron_kd.selection.split_dataset import SplitDatasetConfig
from megatron_kd.selection.split_dataset import run as split


def scores(folder: Path, name: str, dataset: ChunkDataset, **changes: object) -> np.ndarray:
    values = np.random.default_rng(len(name)).normal(3, 1, len(dataset)).astype(np.float32)
    values[[not dataset.has_unmasked_position(index) for index in range(len(dataset))]] = np.nan
    model = {"fingerprint": name, "path": f"models/{name}", **changes.pop("model", {})}
    write_score_file(folder / name, values, dataset, model, "float32", {"tool": "test"}, **changes)
    return values


def opened(folder: Path, dataset: ChunkDataset, **how: bool) -> Differences:
    return measured_differences(str(folder / "teacher"), str(folder / "reference"), dataset, **how)


def test_reference_minus_teacher_in_single_precision(tmp_path: Path, dataset: ChunkDataset) -> None:
    teacher, reference = (scores(tmp_path, name, dataset) for name in ("teacher", "reference"))
    found = opened(tmp_path, dataset)
    np.testing.assert_array_equal(found.block(5, 30), (reference - teacher)[5:30])
    assert found.block(0, 40).dtype == np.float32
    np.testing.assert_array_equal(found.teacher(0, 40), teacher)
    np.testing.assert_array_equal(found.reference(3, 9), reference[3:9])
    assert [parent["role"] for parent in found.parents] == ["teacher", "reference"]
    assert found.models == {"teacher": "models/teacher", "reference": "models/reference"}


def test_scores_of_a_root_serve_a_part_of_it(tmp_path: Path, dataset: ChunkDataset) -> None:
    teacher, reference = (scores(tmp_path, name, dataset) for name in ("teacher", "reference"))
    split(from_mapping(SplitDatasetConfig, {"data": {"path": str(dataset.path)}, "fraction": 0.5,
                                            "output": str(tmp_path / "half")}, "test"))  # fmt: skip
    half = ChunkDataset.open(tmp_path / "half")
    np.testing.assert_array_equal(opened(tmp_path, half).block(0, 20), (reference - teacher)[half.chunk_ids])


def test_one_model_twice_and_chunks_seen_differently(tmp_path: Path, dataset: ChunkDataset) -> None:
    scores(tmp_path, "teacher", dataset)
    scores(tmp_path, "reference", dataset, model={"fingerprint": "teacher"})
    with pytest.raises(DataError, match="scores of the same model .teacher.; give the teacher's and"):
        opened(tmp_path, dataset)
    scores(tmp_path, "other", dataset, reset_position_ids=True)
    with pytest.raises(DataError, match="reset_position_ids = False, .*other with True; score both the same way"):
        measured_differences(str(tmp_path / "teacher"), str(tmp_path / "other"), dataset)


def test_a_reference_model_that_was_trained_on_the_chunks(tmp_path: Path, dataset: ChunkDataset) -> None:
    scores(tmp_path, "teacher", dataset)
    scores(
        tmp_path, "reference", dataset, model={"trained_on": dataset.fingerprint, "trained_on_path": str(dataset.path)}
    )
    with pytest.raises(DataError, match="trained on 40 of the 40 chunks"):
        opened(tmp_path, dataset)
    assert len(opened(tmp_path, dataset, force=True).block(0, 40)) == 40
