"""A cache gives the loss of the same sparse target in memory, whatever the layout, batch, order or selection."""

from contextlib import closing
from unittest.mock import patch

import numpy as np
import pytest

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.teachers.cache.cache_reader import LogitCache
from megatron_kd.teachers.cache.codecs import SampledCodec, TopKCodec, TopPCodec
from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import (
    LAYOUTS,
    VOCABULARY,
    call_verb,
    largest_relative_difference,
    make_dataset,
    train_here,
    train_in_ranks,
)

TOLERANCE = 1e-4
CODECS = {
    "top_k": (TopKCodec(12, VOCABULARY), ["codec=top_k", "top_k=12"], "auto"),
    "renormalised": (TopKCodec(12, VOCABULARY), ["codec=top_k", "top_k=12"], "renormalised"),
    "top_p": (TopPCodec(24, VOCABULARY, top_p=0.5), ["codec=top_p", "top_k=24", "top_p=0.5"], "auto"),
    "sampled": (SampledCodec(16, VOCABULARY), ["codec=sampled", "num_draws=16"], "auto"),
    "weighted": (
        SampledCodec(16, VOCABULARY, proposal_exponent=0.8),
        ["codec=sampled", "num_draws=16", "proposal_exponent=0.8"],
        "auto",
    ),
}
TRAINING = [
    "model.name=qwen_toy_student", "training.train_iters=7", "training.global_batch_size=8",
    "training.micro_batch_size=2", "optimizer.lr_warmup_iters=2", "distillation.method=vanilla_kd",
]  # fmt: skip
ALL_CELLS = [(codec, layout) for codec in CODECS for layout in LAYOUTS]
CELLS = [("top_k", "TP2 PP2"), ("top_p", "DP2"), ("sampled", "TP2 SP"), ("weighted", "PP2 VPP2"), ("top_k", "CP2")]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """40 chunks: seven steps of 8 cross the end of an epoch."""
    return make_dataset(tmp_path_factory.mktemp("data") / "chunks", chunks=40)


@pytest.fixture(scope="session")
def part(dataset, tmp_path_factory):
    """A selection from it, as difference sampling makes one."""
    kept, output = list(range(1, 40, 3)), tmp_path_factory.mktemp("part") / "chunks"
    with building(output) as folder, closing(ChunkDatasetWriter(folder, dataset.tokenizer_info(), 32)) as writer:
        for index in kept:
            writer.add(dataset[index], np.array([len(dataset[index])]))
        writer.finish({"tool": "test"}, [], dataset.root_fingerprint, dataset.root_ids(np.array(kept)))
    return ChunkDataset.open(output)


def write_cache(dataset, teacher, name, layout, output, *more):
    world, keys = LAYOUTS[layout]
    keys = [key for key in keys if not any(word in key for word in ("overlap", "virtual", "context"))]
    settings = [
        f"data.path={dataset.path}", f"teacher.path={teacher}", f"output={output}", *CODECS[name][1],
        "micro_batch_size=3", "chunks_per_shard=13", *keys, *more,
    ]  # fmt: skip
    shared_ranks(world).run(
        call_verb, "megatron_kd.teachers.cache_teacher_logits", "CacheTeacherLogitsConfig", settings, timeout=300
    )
    return LogitCache.open(output)


def train_in_memory(settings, teacher, codec, sparse_target):
    """``train`` on one rank with the teacher of ``tests/reference/sparse_teacher.py``."""
    from megatron_kd.teachers.teacher_config import TeacherConfig
    from megatron_kd.training import train
    from tests.reference.sparse_teacher import load_in_memory

    def build_teacher(run, groups):
        return load_in_memory(teacher, run.data, codec, sparse_target, run.runtime)

    with (
        patch.object(train, "build_teacher", build_teacher),
        patch.object(TeacherConfig, "gives_sparse_knowledge", True),
    ):
        train_here(settings)


@pytest.fixture(scope="module")
def in_memory(teacher, tmp_path_factory):
    """Metrics of a one-rank run with the knowledge made in memory, computed at first use."""
    from megatron_kd.metrics.tracker import read_metrics

    runs = {}

    def metrics(name, data):
        if (name, data.path) not in runs:
            folder = tmp_path_factory.mktemp("memory") / "run"
            codec, _, sparse_target = CODECS[name]
            settings = [
                f"data.path={data.path}", f"output={folder}", *TRAINING, "teacher.placement=colocated",
                f"teacher.path={teacher}",
            ]  # fmt: skip
            shared_ranks(1).run(train_in_memory, settings, str(teacher), codec, sparse_target, timeout=300)
            runs[name, data.path] = read_metrics(folder)
        return runs[name, data.path]

    return metrics


@pytest.fixture(scope="module")
def caches(dataset, teacher, tmp_path_factory):
    """A cache of each codec, written under one rank at first use."""
    made = {}

    def cache(name):
        key = tuple(CODECS[name][1])
        if key not in made:
            output = tmp_path_factory.mktemp("cache") / "cache"
            made[key] = write_cache(dataset, teacher, name, "TP1 PP1", output)
        return made[key]

    return cache


def train_cached(name, layout, data, cache, folder, *more):
    keys = [
        f"data.path={data.path}", *TRAINING, "teacher.placement=cached", f"teacher.cache_path={cache.path}",
        f"distillation.sparse_target={CODECS[name][2]}", *more,
    ]  # fmt: skip
    return train_in_ranks(layout, keys, folder)


def assert_same(ours, reference):
    for key in ("loss", "lm_loss", "kd_loss", "tail_mass", "grad_norm"):
        assert largest_relative_difference(ours, reference, key) < TOLERANCE, key
    assert len({row["kd_loss"] for row in ours}) == len(ours) and ours[-1]["kd_loss"] > 0


@pytest.mark.parametrize(
    ("name", "layout"),
    [pytest.param(*cell, marks=[] if cell in CELLS else pytest.mark.slow) for cell in ALL_CELLS],
)
def test_every_layout(name, layout, in_memory, caches, dataset, tmp_path):
    assert_same(train_cached(name, layout, dataset, caches(name), tmp_path / "run"), in_memory(name, dataset))


def test_another_micro_batch_on_a_selection(in_memory, caches, part, tmp_path):
    """A micro-batch of 4 against one of 2; 13 chunks of 40, in an order of their own, over several epochs."""
    ours = train_cached("sampled", "DP2", part, caches("sampled"), tmp_path / "run", "training.micro_batch_size=4")
    assert_same(ours, in_memory("sampled", part))


def test_the_targets_differ_from_each_other(in_memory, dataset):
    """The comparisons above would also hold if the codec did not matter."""
    losses = {name: in_memory(name, dataset)[0]["kd_loss"] for name in ("top_k", "top_p", "sampled", "weighted")}
    assert len({round(loss, 3) for loss in losses.values()}) == 4, losses


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("sampled", "TP2 PP2"),
        ("top_k", "TP2 SP"),
        pytest.param("top_k", "PP2 DP2", marks=pytest.mark.slow),
        pytest.param("weighted", "TP2", marks=pytest.mark.slow),
        pytest.param("top_p", "TP2 PP2", marks=pytest.mark.slow),
    ],
)
def test_a_cache_written_under_another_layout(name, layout, caches, dataset, teacher, tmp_path):
    """The same ids and weights, but for rounding at the edges of draws and codes."""
    reference, ours = caches(name), write_cache(dataset, teacher, name, layout, tmp_path / "cache")
    assert ours.teacher_fingerprint == reference.teacher_fingerprint
    same = total = 0
    for row in range(dataset.num_chunks):
        a, b = ours.read(row), reference.read(row)
        assert ours.index(row)["token_hash"] == reference.index(row)["token_hash"]
        assert np.array_equal(a.rows, b.rows)
        np.testing.assert_allclose(a.tail, b.tail, atol=2e-2 if "sampled" in name or name == "weighted" else 1e-4)
        if np.array_equal(a.ids, b.ids):
            same += 1
            np.testing.assert_allclose(a.weights, b.weights, rtol=0.02)
        total += 1
    assert same >= 0.9 * total


def test_more_replicas_write_the_same_bytes(caches, dataset, teacher, tmp_path):
    reference, ours = caches("sampled"), write_cache(dataset, teacher, "sampled", "DP2", tmp_path / "cache")
    names = sorted(path.name for path in reference.path.iterdir())
    assert sorted(path.name for path in ours.path.iterdir()) == names and "knowledge-00003.bin" in names
    for name in names:
        if name != "manifest.json":
            assert (ours.path / name).read_bytes() == (reference.path / name).read_bytes(), name
    assert ours.fingerprint == reference.fingerprint
