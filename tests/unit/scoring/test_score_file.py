from pathlib import Path

import numpy as np
import pytest

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.errors import DataError
from megatron_kd.scoring.score_file import ScoreFile, write_score_file
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset
from tests.reference.full_disk import said_on_a_full_disk

# the forked child uses numpy and files alone, never the threads of the parent
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

MODEL = {"path": "models/teacher", "fingerprint": "f00d"}
CHUNKS = [np.array([1, 2, 3]), np.array([7]), np.array([0, 0, 5]), np.array([4, 0, 6])]  # 1 and 2 have nothing to score


@pytest.fixture
def scored(tmp_path: Path) -> ChunkDataset:
    return write_chunk_dataset(tmp_path / "dataset", CHUNKS, plain_tokenizer_info(10), 8)


def write(folder: Path, scores: list[float], dataset: ChunkDataset, **changes: object) -> ScoreFile:
    settings = {"model": MODEL, "compute_dtype": "float32", "producer": {"tool": "test"}, **changes}
    return write_score_file(folder, np.array(scores, dtype=np.float32), dataset, **settings)


def test_round_trip(tmp_path: Path, scored: ChunkDataset) -> None:
    written = write(tmp_path / "scores", [1.5, np.nan, np.nan, 0.25], scored)
    found = ScoreFile.open(tmp_path / "scores")
    assert found.scores.dtype == np.float32
    np.testing.assert_array_equal(found.scores, np.array([1.5, np.nan, np.nan, 0.25], np.float32))
    assert found.unscored.tolist() == [1, 2]
    assert found.fingerprint == written.fingerprint
    assert (found.dataset_fingerprint, found.model_fingerprint) == (scored.fingerprint, "f00d")
    assert found.view == {"mask_rule": "input_is_not_pad", "reset_attention_mask": False, "reset_position_ids": False}
    assert np.load(tmp_path / "scores" / "scores.npy").shape == (4,)
    found.check_matches(scored)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    many = write_chunk_dataset(tmp_path / "many", [np.array([1, 2])] * 2000, plain_tokenizer_info(10), 8)
    assert said_on_a_full_disk(lambda: write(tmp_path / "scores", [1.5] * 2000, many), 5000) == "full"
    assert [path.name for path in tmp_path.iterdir()] == ["many"]


def test_its_identity_is_its_contents(tmp_path: Path, scored: ChunkDataset) -> None:
    scores = [1.5, np.nan, np.nan, 0.25]
    first = write(tmp_path / "a", scores, scored).fingerprint
    assert write(tmp_path / "b", scores, scored).fingerprint == first
    others = [
        write(tmp_path / "c", [1.5, np.nan, np.nan, 0.5], scored),
        write(tmp_path / "d", scores, scored, model={"fingerprint": "beef"}),
        write(tmp_path / "e", scores, scored, reset_attention_mask=True),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 3])
def test_a_score_that_is_not_finite_is_refused_and_nothing_written(
    tmp_path: Path, scored: ChunkDataset, value: float, place: int
) -> None:
    scores = [1.0, np.nan, np.nan, 1.0]
    scores[place] = value
    with pytest.raises(DataError, match=rf"score of chunk {place} is {value} \(1 of 4"):
        write(tmp_path / "scores", scores, scored)
    assert not (tmp_path / "scores").exists()


def test_an_infinite_score_of_a_chunk_without_positions_is_refused(tmp_path: Path, scored: ChunkDataset) -> None:
    with pytest.raises(DataError, match="score of chunk 2 is inf"):
        write(tmp_path / "scores", [1.0, np.nan, np.inf, 1.0], scored)


def test_a_wrong_number_of_scores_is_a_fault(tmp_path: Path, scored: ChunkDataset) -> None:
    with pytest.raises(ValueError, match="for 4 chunks"):
        write(tmp_path / "scores", [1.0, 2.0], scored)


def test_scores_of_another_dataset_are_refused_with_both_fingerprints(tmp_path: Path, scored: ChunkDataset) -> None:
    scores = write(tmp_path / "scores", [1.0, np.nan, np.nan, 1.0], scored)
    other = write_chunk_dataset(tmp_path / "other", [*CHUNKS[:3], np.array([4, 0, 7])], plain_tokenizer_info(10), 8)
    with pytest.raises(DataError) as caught:
        scores.check_matches(other)
    assert scored.fingerprint in str(caught.value) and other.fingerprint in str(caught.value)


def test_scores_of_the_root_serve_a_selection(tmp_path: Path, scored: ChunkDataset) -> None:
    scores = write(tmp_path / "scores", [1.0, np.nan, np.nan, 4.0], scored)
    (tmp_path / "selection").mkdir()
    writer = ChunkDatasetWriter(tmp_path / "selection", plain_tokenizer_info(10), 8)
    writer.add(CHUNKS[3], np.array([3]))
    writer.finish({"tool": "test"}, (), scored.fingerprint, np.array([3]))
    selection = ChunkDataset.open(tmp_path / "selection")
    assert scores.reader(selection)(0, 1).tolist() == [4.0]
    assert scores.reader(scored)(0, 4)[0] == 1.0


def test_a_flipped_bit_in_any_file_is_found(tmp_path: Path, scored: ChunkDataset) -> None:
    folder = write(tmp_path / "scores", [1.0, np.nan, np.nan, 1.0], scored).path
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(0, len(whole), 3):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << position % 8
            path.write_bytes(bytes(damaged))
            with pytest.raises(DataError):
                ScoreFile.open(folder)
        path.write_bytes(whole[:-1])
        with pytest.raises(DataError):
            ScoreFile.open(folder)
        path.write_bytes(whole)
    ScoreFile.open(folder)


def test_an_existing_output_is_refused(tmp_path: Path, scored: ChunkDataset) -> None:
    write(tmp_path / "scores", [1.0, np.nan, np.nan, 1.0], scored)
    with pytest.raises(DataError, match="already exists"):
        write(tmp_path / "scores", [1.0, np.nan, np.nan, 1.0], scored)


def test_a_dataset_is_not_a_score_file(scored: ChunkDataset) -> None:
    with pytest.raises(DataError, match="is a chunk dataset, where a score file is needed"):
        ScoreFile.open(scored.path)
