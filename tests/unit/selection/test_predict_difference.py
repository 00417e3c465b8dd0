"""The proxy learns an r that depends on what a chunk says; measured values are kept; a killed run goes on."""

from pathlib import Path

import numpy as np
import pytest

from megatron_kd.config import from_mapping
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.scoring.journal import ScoreJournal
from megatron_kd.scoring.score_file import DIFFERENCE_KIND, ScoreFile, write_score_file
from megatron_kd.selection.predict_difference import PredictDifferenceConfig, run
from megatron_kd.selection.sample_by_difference import SampleByDifferenceConfig
from megatron_kd.selection.sample_by_difference import run as sample
from megatron_kd.selection.split_dataset import SplitDatasetConfig
from megatron_kd.selection.split_dataset import run as split
from tests.distributed.training.runs import SEQ_LENGTH, VOCABULARY
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset
from tests.unit.scoring.test_score_corpus import save_model

CHUNKS = 240


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> ChunkDataset:
    """Chunks whose share of ids below 150 is r; the last has no position that counts."""
    generator = np.random.default_rng(5)
    shares = generator.random(CHUNKS)
    chunks = [
        np.where(generator.random(SEQ_LENGTH) < share, generator.integers(1, 150, SEQ_LENGTH),
                 generator.integers(150, VOCABULARY, SEQ_LENGTH))
        for share in shares
    ]  # fmt: skip
    chunks[-1] = np.array([4])
    return write_chunk_dataset(
        tmp_path_factory.mktemp("corpus") / "corpus", chunks, plain_tokenizer_info(VOCABULARY, 0), SEQ_LENGTH
    )


def true_difference(dataset: ChunkDataset) -> np.ndarray:
    return np.array([(dataset[i] < 150).mean() if len(dataset[i]) > 1 else np.nan for i in range(len(dataset))])


@pytest.fixture(scope="module")
def keys(corpus: ChunkDataset, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("parts")
    split(from_mapping(SplitDatasetConfig, {"data": {"path": str(corpus.path)}, "fraction": 0.5, "seed": 3,
                                            "output": str(folder / "subset")}, "test"))  # fmt: skip
    subset = ChunkDataset.open(folder / "subset")
    ones = np.where(np.isnan(true_difference(subset)), np.nan, 1.0)
    for name, values in (("teacher", ones), ("reference", ones + true_difference(subset))):
        write_score_file(folder / name, values, subset, {"fingerprint": name}, "float32", {"tool": "test"})
    proxy = save_model(folder / "proxy", corpus)
    return {
        "data": {"path": str(corpus.path)}, "proxy": {"path": str(proxy)}, "micro_batch_size": 8,
        "subset": {"path": str(subset.path), "teacher_scores": str(folder / "teacher"),
                   "reference_scores": str(folder / "reference")},
        "training": {"train_iters": 60, "batch_size": 16, "lr": 1e-2, "warmup_iters": 5},
    }  # fmt: skip


def predict(keys: dict, output: Path, **changes: object) -> ScoreFile:
    run(from_mapping(PredictDifferenceConfig, {**keys, "output": str(output), **changes}, "test"))
    return ScoreFile.open(output, DIFFERENCE_KIND)


def test_the_proxy_ranks_chunks_that_were_never_scored(
    corpus: ChunkDataset, keys: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = predict(keys, tmp_path / "r")
    actual = true_difference(corpus)
    measured = ChunkDataset.open(keys["subset"]["path"]).chunk_ids
    np.testing.assert_allclose(found.scores[measured], actual[measured], atol=1e-6)
    others = np.setdiff1d(np.flatnonzero(~np.isnan(actual)), measured)
    assert np.corrcoef(found.scores[others], actual[others])[0, 1] > 0.9
    assert found.manifest["producer"]["quality"]["spearman"] > 0.8
    assert [parent["kind"] for parent in found.manifest["parents"]] == ["chunk_dataset", "score_file", "score_file"]
    assert np.isnan(found.scores[-1]) and found.unscored.tolist() == [CHUNKS - 1]
    predict(keys, tmp_path / "r")
    assert "already made" in capsys.readouterr().err
    settings = {"data": {"path": str(corpus.path)}, "predicted_difference": str(tmp_path / "r"), "ratio": 0.25,
                "output": str(tmp_path / "sampled")}  # fmt: skip
    kept = ChunkDataset.open(sample(from_mapping(SampleByDifferenceConfig, settings, "test"))).chunk_ids
    assert len(kept) == 60 and np.nanmean(actual[kept]) > 0.8


def test_a_killed_run_goes_on_with_the_same_proxy(keys: dict, tmp_path: Path) -> None:
    whole = predict(keys, tmp_path / "whole", chunks_per_unit=20)
    add, written = ScoreJournal.add, []

    def dying_add(self, unit, *arguments):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(unit)
        add(self, unit, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ScoreJournal, "add", dying_add)
        predict(keys, tmp_path / "r", chunks_per_unit=20)
    assert (tmp_path / "r.partial" / "proxy.part").is_file() and not (tmp_path / "r").exists()
    assert predict(keys, tmp_path / "r", chunks_per_unit=20).fingerprint == whole.fingerprint


def test_a_subset_of_another_corpus_is_refused(keys: dict, tmp_path: Path, corpus: ChunkDataset) -> None:
    other = write_chunk_dataset(
        tmp_path / "other", [np.arange(1, 9)] * 30, plain_tokenizer_info(VOCABULARY, 0), SEQ_LENGTH
    )
    with pytest.raises(DataError, match="draw the subset from that corpus with split_dataset"):
        predict(keys, tmp_path / "r", data={"path": str(other.path)})


def test_a_reference_model_that_has_seen_the_subset_is_refused(keys: dict, tmp_path: Path) -> None:
    subset = ChunkDataset.open(keys["subset"]["path"])
    values = np.load(Path(keys["subset"]["reference_scores"]) / "scores.npy")
    model = {"fingerprint": "leaky", "trained_on": subset.fingerprint, "trained_on_path": str(subset.path)}
    write_score_file(tmp_path / "leaky", values, subset, model, "float32", {"tool": "test"})
    with pytest.raises(DataError, match="the reference model was trained on 120 of the 120 chunks"):
        predict(keys, tmp_path / "r", subset={**keys["subset"], "reference_scores": str(tmp_path / "leaky")})
