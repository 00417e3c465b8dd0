"""``score_corpus``: what was done is kept and not done again; what is refused; who may judge which chunks."""

from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.config import from_mapping
from megatron_kd.data.blend import open_data
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.errors import ConfigError, DataError
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.scoring.chunk_losses import ChunkScorer
from megatron_kd.scoring.journal import ScoreJournal
from megatron_kd.scoring.leakage import refuse_reference_trained_on
from megatron_kd.scoring.score_corpus import ScoreCorpusConfig, run
from megatron_kd.scoring.score_file import ScoreFile
from megatron_kd.training.checkpoint import Progress
from tests.distributed.training.runs import make_dataset
from tests.reference.one_rank import TrainingParts
from tests.reference.saved_checkpoint import save_checkpoint

UNITS = 10


def select(root: ChunkDataset, output: Path, ids: list[int], role: str) -> ChunkDataset:
    """A selection of a dataset, marked with a role."""
    with building(output) as folder:
        writer = ChunkDatasetWriter(folder, root.tokenizer_info(), root.seq_length)
        for index in ids:
            writer.add(root[index], np.array([len(root[index])]))
        writer.finish({"tool": "test", "role": role}, (), root.root_fingerprint, root.root_ids(np.array(ids)))
    return ChunkDataset.open(output)


def save_model(root: Path, trained_on: ChunkDataset, about: dict | None = None) -> Path:
    with distributed_runtime() as runtime:
        parts = TrainingParts(trained_on, runtime)
        facts = {
            "tokenizer_hash": trained_on.tokenizer_hash, "seq_length": 32, "precision": "fp32",
            "dataset_fingerprint": trained_on.fingerprint, "dataset_path": str(trained_on.path),
            **(about or {}),
        }  # fmt: skip
        save_checkpoint(root / "checkpoints", Progress(1), parts.model, parts.optimizer, parts.groups,
                        architecture=parts.architecture, about=facts)  # fmt: skip
    return root


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ChunkDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "chunks", chunks=20)


@pytest.fixture(scope="module")
def model(dataset: ChunkDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "run", dataset)


def score(dataset: ChunkDataset, model: Path, output: Path, **keys: object) -> np.ndarray:
    tree = {"data": {"path": str(dataset.path)}, "model": {"path": str(model)}, "output": str(output)}
    run(from_mapping(ScoreCorpusConfig, {**tree, "micro_batch_size": 2, "chunks_per_unit": 2, **keys}, "test"))
    return np.load(output / "scores.npy")


@pytest.fixture
def units_done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first chunk of every unit that was computed since."""
    done: list[int] = []
    whole = ChunkScorer.unit

    def counted(self, micro_batches):
        done.append(int(min(micro_batch.indices.min() for micro_batch in micro_batches)))
        return whole(self, micro_batches)

    monkeypatch.setattr(ChunkScorer, "unit", counted)
    return done


def break_off_after(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End a run as if its process had gone, after this many units."""
    whole, written = ScoreJournal.add, []

    def counted(self, unit, scores):
        if len(written) == units:
            raise KeyboardInterrupt
        written.append(unit)
        whole(self, unit, scores)

    monkeypatch.setattr(ScoreJournal, "add", counted)


def test_what_was_done_is_not_done_again(
    dataset: ChunkDataset, model: Path, tmp_path: Path, units_done: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = score(dataset, model, tmp_path / "whole")
    assert len(units_done) == UNITS
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_off_after(7, patch)
        score(dataset, model, tmp_path / "scores")
    assert not (tmp_path / "scores").exists() and (tmp_path / "scores.partial").is_dir()
    units_done.clear()
    again = score(dataset, model, tmp_path / "scores")
    assert units_done == [14, 16, 18] and again.tobytes() == undisturbed.tobytes()
    assert f"7 of {UNITS} units were done before" in capsys.readouterr().err
    assert not (tmp_path / "scores.partial").exists()
    units_done.clear()
    score(dataset, model, tmp_path / "scores")
    assert not units_done and "already made" in capsys.readouterr().err
    with pytest.raises(DataError, match="already exists and is not this same"):
        score(dataset, model, tmp_path / "scores", micro_batch_size=3)


def test_other_unfinished_scores_are_refused(
    dataset: ChunkDataset, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        break_off_after(2, patch)
        score(dataset, model, tmp_path / "scores")
    with pytest.raises(DataError, match=r"unfinished work of another recipe \(.*micro_batch_size 2 there, 3 now"):
        score(dataset, model, tmp_path / "scores", micro_batch_size=3)
    score(dataset, model, tmp_path / "scores")


def test_the_composition_of_micro_batches_matters_little(dataset: ChunkDataset, model: Path, tmp_path: Path) -> None:
    found = [score(dataset, model, tmp_path / str(size), micro_batch_size=size) for size in (1, 5)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_a_reference_model_does_not_judge_its_own_training_data(
    dataset: ChunkDataset, tmp_path: Path, model: Path
) -> None:
    split = select(dataset, tmp_path / "reference", [1, 4, 9], "reference")
    rest = select(dataset, tmp_path / "rest", [index for index in range(20) if index not in (1, 4, 9)], "train")
    overlapping = select(dataset, tmp_path / "overlapping", [3, 4, 5], "train")
    reference = save_model(tmp_path / "run", split)
    for judged, shared in ((split, 3), (dataset, 3), (overlapping, 1)):
        with pytest.raises(DataError, match=f"{shared} of its {len(judged)} chunks are in .*the reference split"):
            score(judged, reference, tmp_path / "scores")
        assert not list(tmp_path.glob("scores*"))
    score(rest, reference, tmp_path / "of_rest")
    score(split, reference, tmp_path / "forced", force=True)
    score(split, model, tmp_path / "by_another")  # a teacher may have seen what it judges
    assert len(score(dataset, model, tmp_path / "own")) == 20


def test_every_part_of_a_blend_counts(dataset: ChunkDataset, tmp_path: Path) -> None:
    """The reference split is not the first of the blend that the model was trained on."""
    other = make_dataset(tmp_path / "other", chunks=5, seed=7)
    split = select(dataset, tmp_path / "reference", [1, 4, 9], "reference")
    rest = select(dataset, tmp_path / "rest", [index for index in range(20) if index not in (1, 4, 9)], "train")
    paths = [str(other.path), str(split.path)]
    blend = open_data(paths)
    model = save_model(tmp_path / "run", other, {
        "dataset_fingerprint": blend.fingerprint, "dataset_path": str(blend.path),
        "dataset_parents": blend.manifest["parents"], "config": {"data": {"path": paths, "weights": None}},
    })  # fmt: skip
    with pytest.raises(DataError, match="3 of its 20 chunks are in .*the reference split"):
        score(dataset, model, tmp_path / "scores")
    score(rest, model, tmp_path / "of_rest")
    score(dataset, model, tmp_path / "forced", force=True)
    forced = ScoreFile.open(str(tmp_path / "forced"))
    assert [part["path"] for part in forced.manifest["model"]["trained_on_parts"]] == paths
    with pytest.raises(DataError, match="trained on 3 of the 20 chunks"):
        refuse_reference_trained_on(forced.manifest["model"], dataset, forced.path)
    refuse_reference_trained_on(forced.manifest["model"], rest, forced.path)


def test_bad_settings(dataset: ChunkDataset, model: Path, tmp_path: Path) -> None:
    for keys, message in (
        ({"micro_batch_size": 0}, "'micro_batch_size' must be at least 1"),
        ({"chunks_per_unit": 0}, "'chunks_per_unit' must be at least 1"),
        ({"parallel": {"context_parallel_size": 2}}, "'parallel.context_parallel_size' must be 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            score(dataset, model, tmp_path / "scores", **keys)
