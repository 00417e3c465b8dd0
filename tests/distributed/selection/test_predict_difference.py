"""The proxy learns and predicts the same on one rank and on two."""

import numpy as np
import pytest

from megatron_kd.config import from_mapping
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.scoring.score_file import write_score_file
from megatron_kd.selection.split_dataset import SplitDatasetConfig
from megatron_kd.selection.split_dataset import run as split
from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import call_verb, make_dataset, train_in_ranks


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    dataset = make_dataset(folder / "corpus", chunks=90)
    tree = {"data": {"path": str(dataset.path)}, "fraction": 0.6, "output": str(folder / "subset")}
    split(from_mapping(SplitDatasetConfig, tree, "test"))
    subset = ChunkDataset.open(folder / "subset")
    for name, share in (("teacher", 0.0), ("reference", 1.0)):
        values = np.array([2 + share * subset[i].mean() / 300 for i in range(len(subset))])
        values[[i for i in range(len(subset)) if not subset.has_unmasked_position(i)]] = np.nan
        write_score_file(folder / name, values, subset, {"fingerprint": name}, "float32", {"tool": "test"})
    steps = ["model.name=qwen_toy_student", "training.train_iters=2", "training.global_batch_size=8"]
    train_in_ranks("TP1 PP1", [f"data.path={dataset.path}", *steps], folder / "run")
    return [
        f"data.path={dataset.path}", f"subset.path={subset.path}", f"subset.teacher_scores={folder}/teacher",
        f"subset.reference_scores={folder}/reference", f"proxy.path={folder}/run", "training.train_iters=15",
        "training.batch_size=7", "training.lr=1e-3", "micro_batch_size=4", "chunks_per_unit=8",
    ]  # fmt: skip


def test_two_ranks_give_the_predictions_of_one(settings, tmp_path):
    for ranks in (1, 2):
        shared_ranks(ranks).run(
            call_verb, "megatron_kd.selection.predict_difference", "PredictDifferenceConfig",
            [*settings, f"output={tmp_path / str(ranks)}"],
        )  # fmt: skip
    one, two = (np.load(tmp_path / str(ranks) / "scores.npy") for ranks in (1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)
    assert np.nanstd(one) > 1e-3
