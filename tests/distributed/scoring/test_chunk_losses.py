"""Chunk losses do not depend on the layout: within 1e-5 of one rank's."""

import dataclasses

import numpy
import pytest
import torch

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.models.gpt import build_model
from megatron_kd.models.parameters import initialize_weights
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.mcore_patches import cpu_backend
from megatron_kd.parallel.runtime import seed_everything
from megatron_kd.scoring.chunk_losses import chunk_losses
from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import call_verb, make_dataset, train_in_ranks
from tests.reference.naive_scores import naive_chunk_losses
from tests.reference.one_rank import TINY

LAYOUTS = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "DP2": {},
    "CP2": {"context_parallel_size": 2},
}


def score_here(keys, path, naive=False):
    """Losses of every chunk of a dataset on this rank of a world."""
    cpu_backend.install()
    layout = ParallelLayout.for_world(ParallelConfig(**keys), torch.distributed.get_world_size())
    groups = create_process_groups(layout)
    seed_everything(0, groups)
    architecture = dataclasses.replace(TINY, num_layers=4)
    chunks = build_model(
        architecture, layout, groups, precision="fp32", device=torch.device("cpu"), max_sequence_length=32
    )
    for chunk in chunks:
        initialize_weights(chunk, architecture.init_std, seed=4)
    dataset = ChunkDataset.open(path)
    if naive:
        return naive_chunk_losses(chunks[0], dataset)
    losses = chunk_losses(chunks, groups, dataset, device=torch.device("cpu"), micro_batch_size=3)
    return losses.nats, losses.tokens, losses.text_bytes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """23 chunks: the last micro-batch of 3 is filled up, and the ranks of DP2 get unequal numbers of them."""
    return make_dataset(tmp_path_factory.mktemp("data") / "chunks", chunks=23)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_has_the_losses_of_one(layout, dataset):
    ((nats, tokens),) = shared_ranks(1).run(score_here, {}, str(dataset.path), naive=True)
    ((_, _, text_bytes),) = shared_ranks(1).run(score_here, {}, str(dataset.path))
    for ours in shared_ranks(2).run(score_here, LAYOUTS[layout], str(dataset.path)):
        numpy.testing.assert_allclose(ours[0], nats, rtol=1e-5)
        assert ours[1].tolist() == tokens.tolist() and ours[2].tolist() == text_bytes.tolist()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("PP2 VPP2", "CP2")])
def test_the_verbs_agree_with_one_rank(layout, dataset, trained, tmp_path):
    """Not under VPP2, as the model has two layers; context parallelism is refused."""
    keys = [f"parallel.{name}={str(value).lower()}" for name, value in LAYOUTS[layout].items()]
    paths = [f"data.path={dataset.path}", f"model.path={trained}"]
    ours = shared_ranks(2).run(call_verb, "megatron_kd.evaluation.evaluate", "EvaluateConfig", [*paths, *keys])
    (expected,) = shared_ranks(1).run(call_verb, "megatron_kd.evaluation.evaluate", "EvaluateConfig", paths)
    for figures in ours:
        assert figures == {
            **expected,
            "heldout_loss": pytest.approx(expected["heldout_loss"], rel=1e-5),
            "bits_per_byte": pytest.approx(expected["bits_per_byte"], rel=1e-5),
        }
    shared_ranks(2).run(
        call_verb,
        "megatron_kd.scoring.score_corpus",
        "ScoreCorpusConfig",
        [*paths, *keys, f"output={tmp_path / 'ours'}"],
    )
    shared_ranks(1).run(
        call_verb, "megatron_kd.scoring.score_corpus", "ScoreCorpusConfig", [*paths, f"output={tmp_path / 'one'}"]
    )
    mine, one = (numpy.load(tmp_path / name / "scores.npy") for name in ("ours", "one"))
    numpy.testing.assert_allclose(mine, one, rtol=1e-5)
    assert len(mine) == 23 and mine.std() > 0.01


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """The run folder of a few steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    keys = ["model.name=qwen_toy_student", "training.train_iters=4", "training.global_batch_size=8"]
    train_in_ranks("TP1 PP1", [f"data.path={dataset.path}", *keys], folder)
    return folder
