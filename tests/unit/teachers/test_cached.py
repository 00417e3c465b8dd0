"""Knowledge from a cache: found by chunk identity in any order, refused where anything differs."""

import dataclasses
import json
from contextlib import closing

import numpy as np
import pytest
import torch

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.artefacts.manifest import read_manifest, write_manifest
from megatron_kd.config import from_mapping
from megatron_kd.data.batch import make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.errors import ConfigError, DataError
from megatron_kd.teachers.cache.cache_reader import LogitCache, View
from megatron_kd.teachers.cache.codecs import SampledCodec, TopKCodec, TopPCodec
from megatron_kd.teachers.cached import CachedTeacher
from megatron_kd.teachers.teacher_config import TeacherConfig
from megatron_kd.training.distillation_config import DistillationConfig
from megatron_kd.training.train_config import TrainConfig
from tests.distributed.training.runs import VOCABULARY, make_dataset
from tests.reference.caches import write_cache

VIEW = View(1.0, "fp32")
CODECS = {
    "ghost": TopKCodec(12, VOCABULARY),
    "renormalised": TopPCodec(12, VOCABULARY, top_p=0.9),
    "sampled": SampledCodec(20, VOCABULARY),
    "weighted": SampledCodec(20, VOCABULARY, proposal_exponent=0.9),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "chunks", chunks=40)


@pytest.fixture(scope="module")
def cache(dataset, tmp_path_factory):
    return write_cache(dataset, tmp_path_factory.mktemp("cache") / "top_k", CODECS["ghost"], chunks_per_shard=7)


def select(dataset, kept, output):
    """A selection from a dataset, as difference sampling makes one."""
    with building(output) as folder, closing(ChunkDatasetWriter(folder, dataset.tokenizer_info(), 32)) as writer:
        for index in kept:
            writer.add(dataset[index], np.array([len(dataset[index])]))
        writer.finish({"tool": "test"}, [], dataset.root_fingerprint, dataset.root_ids(np.array(kept)))
    return ChunkDataset.open(output)


def asked(teacher, batch):
    teacher.begin_step([batch])
    return teacher.knowledge(batch)


def knowledge_of(teacher, dataset, indices, seq_length=32):
    return asked(teacher, make_batch(dataset, np.array(indices), seq_length))


@pytest.mark.parametrize("kind", CODECS)
def test_a_batch_gets_its_chunks_in_sequence_major_order(kind, dataset, tmp_path):
    cache = write_cache(dataset, tmp_path / "cache", CODECS[kind], chunks_per_shard=9)
    indices = [30, 7, 2, 39]
    knowledge = knowledge_of(CachedTeacher(cache, dataset, kind), dataset, indices, seq_length=36)
    ids = knowledge.ids.view(36, 4, -1)
    weights, tail = knowledge.weights.view(ids.shape), knowledge.tail_mass.view(36, 4)
    assert knowledge.kind == kind
    for row, index in enumerate(indices):
        record = cache.read(index)
        starts = np.cumsum(record.counts) - record.counts
        for place, count, start, outside in zip(record.rows, record.counts, starts, record.tail, strict=True):
            assert ids[place, row, :count].tolist() == record.ids[start : start + count].tolist()
            assert weights[place, row, :count].tolist() == record.weights[start : start + count].tolist()
            assert (ids[place, row, count:] == -1).all() and tail[place, row] == outside
        absent = np.setdiff1d(np.arange(36), record.rows)
        assert (ids[absent, row] == -1).all() and (weights[absent, row] == 0).all()
    if kind in ("ghost", "renormalised"):
        stored = ids[..., 0] >= 0
        torch.testing.assert_close((weights.sum(-1) + tail)[stored], torch.ones(int(stored.sum())))


def test_a_step_read_ahead_is_the_same(cache, dataset):
    teacher = CachedTeacher(cache, dataset, "ghost")
    batches = [make_batch(dataset, np.arange(4 * i, 4 * i + 4), 32) for i in range(4)]
    alone = [asked(teacher, batch) for batch in batches]
    teacher.begin_step(batches)
    for batch, expected in zip(batches, alone, strict=True):
        found = teacher.knowledge(batch)
        assert torch.equal(found.ids, expected.ids) and torch.equal(found.weights, expected.weights)


def test_batches_are_asked_for_once_in_the_announced_order(cache, dataset):
    teacher = CachedTeacher(cache, dataset, "ghost")
    first, second = (make_batch(dataset, np.array([i]), 32) for i in (1, 2))
    with pytest.raises(DataError, match="none is left of the 0 that were announced"):
        teacher.knowledge(first)
    teacher.begin_step([first, second])
    with pytest.raises(DataError, match=f"key {second.key:#x}, where micro-batch 0 has key {first.key:#x} of the 2"):
        teacher.knowledge(second)
    teacher.knowledge(first.to("cpu"))
    teacher.knowledge(second)
    with pytest.raises(DataError, match="none is left"):
        teacher.knowledge(second)


def test_ranks_before_the_last_stage_read_nothing(cache, dataset):
    teacher = CachedTeacher(cache, dataset, "ghost", is_needed=False)
    batch = make_batch(dataset, np.array([1]), 32)
    teacher.begin_step([batch])
    assert teacher.knowledge(batch) is None


@pytest.mark.parametrize("of_a_part", [False, True])
def test_a_selection_reads_what_its_root_reads(of_a_part, cache, dataset, tmp_path):
    part = select(dataset, [3, 8, 9, 21, 22, 38], tmp_path / "part")
    if of_a_part:  # a cache of the selection, read for a selection from it
        cache = write_cache(part, tmp_path / "cache", CODECS["ghost"])
        expected = knowledge_of(CachedTeacher(cache, part, "ghost"), part, [5, 2])
        smaller = select(part, [2, 5], tmp_path / "smaller")
        found = knowledge_of(CachedTeacher(cache, smaller, "ghost"), smaller, [1, 0])
    else:
        expected = knowledge_of(CachedTeacher(cache, dataset, "ghost"), dataset, [38, 9])
        found = knowledge_of(CachedTeacher(cache, part, "ghost"), part, [5, 2])
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.weights, expected.weights)
    assert not torch.equal(found.ids[0], found.ids[1])


def test_chunks_that_were_not_cached_are_counted(dataset, tmp_path):
    part = select(dataset, [3, 8, 9], tmp_path / "part")
    cache = write_cache(part, tmp_path / "cache", CODECS["ghost"])
    with pytest.raises(DataError, match="lacks 37 of the 40 chunks"):
        cache.check_covers(dataset)


def test_a_foreign_cache_is_refused_with_both_fingerprints(cache, tmp_path):
    other = make_dataset(tmp_path / "other", chunks=40, seed=5)
    with pytest.raises(DataError) as caught:
        CachedTeacher.open(cache.path, other, VIEW)
    assert cache.root_fingerprint in str(caught.value) and other.root_fingerprint in str(caught.value)


def test_other_ids_under_the_same_identity_are_refused(cache, dataset):
    batch = make_batch(dataset, np.array([4, 5]), 32)
    batch.tokens[1, 6] += 1
    with pytest.raises(DataError, match="chunk 5 .* has other ids .* was cached"):
        asked(CachedTeacher(cache, dataset, "ghost"), batch)
    longer = make_batch(dataset, np.array([7]), 36)  # a short chunk
    longer.loss_mask[:, 33:] = 1.0
    with pytest.raises(DataError, match="has other ids"):
        asked(CachedTeacher(cache, dataset, "ghost"), longer)


def test_a_position_that_was_not_cached_is_refused(cache, dataset):
    batch = make_batch(dataset, np.arange(8), 32)
    row, place = (batch.tokens[:, :20] == 0).nonzero()[0].tolist()
    batch.loss_mask[row, place] = 1.0
    with pytest.raises(DataError, match="lacks positions of chunk"):
        asked(CachedTeacher(cache, dataset, "ghost"), batch)


def test_rows_without_a_chunk_have_no_knowledge(cache, dataset):
    batch = make_batch(dataset, np.array([4, 5]), 32)
    batch.chunk_indices[1] = -1
    knowledge = asked(CachedTeacher(cache, dataset, "ghost"), batch)
    assert (knowledge.ids.view(32, 2, -1)[:, 1] == -1).all() and (knowledge.tail_mass.view(32, 2)[:, 1] == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 2.0}, "temperature 1.0 where this run has 2.0"),
        ({"compute_dtype": "bf16"}, "compute_dtype fp32 where this run has bf16"),
        ({"mask_rule": "all"}, "mask_rule input_is_not_pad where this run has all"),
        ({"reset_attention_mask": True}, "reset_attention_mask False where this run has True"),
        ({"reset_position_ids": True}, "reset_position_ids False where this run has True"),
    ],
)
def test_another_view_is_refused_by_name(change, message, cache, dataset):
    with pytest.raises(DataError, match=message):
        CachedTeacher.open(cache.path, dataset, dataclasses.replace(VIEW, **change))


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 3] ^= 4
    path.write_bytes(data[: len(data) - 1] if how == "truncated" else data)
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("name", ["knowledge-00002.bin", "knowledge-00002.idx", "manifest.json", "checksums.json"])
def test_a_damaged_cache_is_refused(name, how, dataset, tmp_path):
    cache = write_cache(dataset, tmp_path / "cache", CODECS["ghost"], chunks_per_shard=7)
    damage(cache.path / name, how)
    with pytest.raises(DataError, match=f"(knowledge-00002|{name})"):
        teacher = CachedTeacher.open(cache.path, dataset, VIEW)
        for index in range(40):
            knowledge_of(teacher, dataset, [index])


def test_damage_is_found_where_it_is_read(dataset, tmp_path):
    cache = write_cache(dataset, tmp_path / "cache", CODECS["ghost"], chunks_per_shard=7)
    damage(cache.path / "knowledge-00002.bin", "flipped")
    teacher = CachedTeacher.open(cache.path, dataset, VIEW)
    knowledge_of(teacher, dataset, [0, 39])
    with pytest.raises(DataError, match="knowledge-00002.bin: block 0 has checksum"):
        knowledge_of(teacher, dataset, [15])


def test_shards_of_another_number_of_chunks_are_refused(dataset, tmp_path):
    cache = write_cache(dataset, tmp_path / "cache", CODECS["ghost"])
    manifest, checksums = read_manifest(cache.path)
    manifest["dataset"]["num_chunks"] = 41
    body = {key: value for key, value in manifest.items() if not key.endswith("sha256")}
    write_manifest(cache.path, "logit_cache", body, checksums)
    with pytest.raises(DataError, match="hold 40 chunks, its manifest states 41"):
        LogitCache.open(cache.path)
    assert json.loads((cache.path / "manifest.json").read_text())["dataset"]["num_chunks"] == 41


@pytest.mark.parametrize(
    ("codec", "asked", "found"),
    [
        ("ghost", "auto", "ghost"),
        ("ghost", "renormalised", "renormalised"),
        ("renormalised", "ghost", "ghost"),
        ("sampled", "auto", "sampled"),
        ("weighted", "auto", "weighted"),
        ("ghost", "sampled", None),
        ("sampled", "ghost", None),
        ("weighted", "sampled", None),
    ],
)
def test_the_loss_is_one_that_the_codec_gives(codec, asked, found):
    if found is None:
        with pytest.raises(ConfigError, match=f"'distillation.sparse_target' {asked} cannot be made of here"):
            CODECS[codec].target_kind(asked, "here")
    else:
        assert CODECS[codec].target_kind(asked, "here") == found


def config_faults(**parts):
    config = from_mapping(
        TrainConfig, {"data": {"path": "x"}, "output": "y", "model": {"name": "qwen_toy_student"}}, "test"
    )
    return list(dataclasses.replace(config, **parts).validate())


def test_configurations_that_cannot_be():
    cached = TeacherConfig(placement="cached", cache_path="c")
    assert config_faults(teacher=cached, distillation=DistillationConfig("vanilla_kd")) == []
    (generated,) = config_faults(teacher=cached, distillation=DistillationConfig("gkd"))
    assert "gkd generates text, which 'teacher.placement' cached does not cover" in generated
    (divergence,) = config_faults(
        teacher=cached, distillation=DistillationConfig("vanilla_kd", divergence="reverse_kl")
    )
    assert "reverse_kl needs the teacher's whole distribution" in divergence
