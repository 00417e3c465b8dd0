"""Diversity on corpora whose measures are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.config import from_mapping, load_config
from megatron_kd.errors import DataError
from megatron_kd.evaluation.measure_diversity import (
    MeasureDiversityConfig,
    mean_pairwise_distance,
    ngram_diversity,
    run,
    tf_idf,
    vendi_score,
)
from megatron_kd.training.train import run as train
from megatron_kd.training.train_config import TrainConfig
from tests.distributed.training.runs import make_dataset
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset


def test_the_vendi_score_counts_different_things():
    """k groups of equal, mutually orthogonal vectors have the score k (the paper's own sanity check)."""
    for k, each in ((1, 7), (3, 5), (8, 1)):
        vectors = np.repeat(np.eye(8)[:k], each, axis=0)
        assert vendi_score(vectors) == pytest.approx(k)
    two = np.array([[1.0, 0.0], [np.cos(0.3), np.sin(0.3)]])
    eigenvalues = (1 + np.cos(0.3)) / 2, (1 - np.cos(0.3)) / 2
    assert vendi_score(two) == pytest.approx(np.exp(-sum(x * np.log(x) for x in eigenvalues)))


def test_both_sides_of_the_gram_matrix_agree():
    vectors = np.random.default_rng(0).normal(size=(30, 12))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    wide = np.concatenate([vectors, np.zeros((30, 40))], axis=1)
    assert vendi_score(vectors) == pytest.approx(vendi_score(wide))
    literal = [1 - vectors[i] @ vectors[j] for i in range(30) for j in range(30) if i != j]
    assert mean_pairwise_distance(vectors) == pytest.approx(np.mean(literal))


def test_ngram_diversity_in_closed_form():
    assert ngram_diversity([np.arange(10)], 10) == 4.0
    assert ngram_diversity([np.zeros(10, int)], 10) == pytest.approx(1 / 10 + 1 / 9 + 1 / 8 + 1 / 7)
    assert ngram_diversity([np.arange(5), np.arange(5)], 5) == 4.0  # only the first five ids count
    assert ngram_diversity([np.arange(5), np.arange(5)], 10) == 2.0


def test_tf_idf_of_chunks_without_a_common_id_is_orthogonal():
    (first, second) = tf_idf([[np.array([1, 1, 2, 0])], [np.array([3, 4])]], 6, 0)
    assert first @ second.T == pytest.approx(0.0) and np.linalg.norm(first) == pytest.approx(1.0)


def test_a_repetitive_corpus_is_less_diverse(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    generator = np.random.default_rng(0)
    varied = [generator.integers(1, 200, 30) for _ in range(60)]
    repeated = [varied[index % 5] for index in range(60)]
    paths = []
    for name, chunks in (("varied", varied), ("repeated", repeated)):
        paths.append(str(write_chunk_dataset(tmp_path / name, chunks, plain_tokenizer_info(200), 32).path))
    tree = {"data": {"paths": paths}, "samples": 60, "output": str(tmp_path / "new" / "diversity.json")}
    found = run(from_mapping(MeasureDiversityConfig, tree, "test"))
    for key in ("vendi_score", "mean_pairwise_distance", "ngram_diversity"):
        assert found[0][key] > found[1][key]
    assert found[1]["vendi_score"] <= 5 + 1e-9
    assert json.loads((tmp_path / "new" / "diversity.json").read_text()) == json.loads(capsys.readouterr().out) == found
    other = write_chunk_dataset(tmp_path / "other", varied, plain_tokenizer_info(201), 32)
    with pytest.raises(DataError, match="several tokenizers"):
        run(from_mapping(MeasureDiversityConfig, {"data": {"paths": [*paths, str(other.path)]}}, "test"))


def test_chunks_embedded_by_a_model(tmp_path: Path):
    dataset = make_dataset(tmp_path / "data", chunks=12)
    keys = [f"data.path={dataset.path}", f"output={tmp_path / 'run'}", "model.name=qwen_toy_reference"]
    train(load_config(TrainConfig, None, [*keys, "training.train_iters=1"]))
    tree = {"data": {"paths": [str(dataset.path)] * 2}, "model": {"path": str(tmp_path / "run")}, "samples": 10}
    first, second = run(from_mapping(MeasureDiversityConfig, tree, "test"))
    assert first == second and first["embedding"] == str(tmp_path / "run")
    assert 1 < first["vendi_score"] <= 10 and 0 < first["mean_pairwise_distance"] < 2
