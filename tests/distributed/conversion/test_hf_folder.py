"""Hugging Face folders as scored models under any layout, and what is wrong with a bad one."""

import json
import shutil

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_kd.checkpoints.weights import open_checkpoint
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.tokenization import load_tokenizer, train_byte_level_bpe
from megatron_kd.errors import CheckpointError
from megatron_kd.scoring.score_file import ScoreFile
from tests.distributed.ranks import shared_ranks
from tests.distributed.training.runs import call_verb
from tests.reference.datasets import write_chunk_dataset

SEQ_LENGTH = 24
TEXTS = [f"line {i}: {chr(97 + i % 26) * (i % 7 + 1)} and {i * i} more words of text" for i in range(300)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def hf_folder(request, tmp_path_factory):
    """A random model with grouped queries, 3 heads a group and an odd vocabulary, saved in several shards."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    train_byte_level_bpe(TEXTS, 300, folder)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=333,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=request.param,
            rope_theta=5000.0,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture(scope="module")
def dataset(hf_folder, tmp_path_factory):
    """Random chunks of the folder's tokenizer."""
    tokenizer = load_tokenizer(hf_folder).info
    generator = numpy.random.default_rng(0)
    chunks = [generator.integers(1, tokenizer.vocab_size, size=SEQ_LENGTH + 1) for _ in range(10)]
    return write_chunk_dataset(tmp_path_factory.mktemp("data") / "chunks", chunks, tokenizer, SEQ_LENGTH)


def reference_scores(hf_folder, dataset: ChunkDataset) -> numpy.ndarray:
    model = Qwen2ForCausalLM.from_pretrained(hf_folder).double().eval()
    scores = []
    for index in range(len(dataset)):
        ids = torch.from_numpy(numpy.asarray(dataset[index], dtype=numpy.int64))
        with torch.no_grad():
            log_q = model(ids[None, :-1]).logits[0].log_softmax(-1)
        losses = -log_q.gather(1, ids[1:, None]).squeeze(1)
        scores.append(losses[ids[:-1] != dataset.pad_id].mean().item())
    return numpy.array(scores)


@pytest.mark.parametrize(
    "world, keys",
    [
        (1, []),
        (2, ["parallel.tensor_model_parallel_size=2"]),
        (2, ["parallel.pipeline_model_parallel_size=2"]),
    ],
)
def test_scores_equal_transformers(hf_folder, dataset, world, keys, tmp_path):
    settings = [f"data.path={dataset.path}", f"model.path={hf_folder}", f"output={tmp_path / 'scores'}", *keys]
    shared_ranks(world).run(call_verb, "megatron_kd.scoring.score_corpus", "ScoreCorpusConfig", settings)
    ours = ScoreFile.open(tmp_path / "scores").scores
    numpy.testing.assert_allclose(ours, reference_scores(hf_folder, dataset), rtol=1e-5)


def broken(hf_folder, tmp_path):
    shutil.copytree(hf_folder, tmp_path / "broken")
    return tmp_path / "broken"


def test_an_index_that_leads_outside_is_refused(hf_folder, tmp_path):
    folder = broken(hf_folder, tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../../etc/weights.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file of its folder"):
        open_checkpoint(folder)


def test_a_missing_tensor_is_listed(hf_folder, tmp_path):
    folder = broken(hf_folder, tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks 'model.norm.weight'"):
        open_checkpoint(folder)


def test_another_family_is_refused(hf_folder, tmp_path):
    folder = broken(hf_folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(CheckpointError, match="mamba"):
        open_checkpoint(folder)


def test_a_truncated_file_is_refused(hf_folder, dataset, tmp_path):
    folder = broken(hf_folder, tmp_path)
    victim = sorted(folder.glob("model-*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    settings = [f"data.path={dataset.path}", f"model.path={folder}", f"output={tmp_path / 'scores'}"]
    with pytest.raises(Exception, match="CheckpointError.*cannot read"):
        shared_ranks(1).run(call_verb, "megatron_kd.scoring.score_corpus", "ScoreCorpusConfig", settings)
    assert not (tmp_path / "scores").exists()


def test_a_tensor_of_another_shape_is_refused(hf_folder, dataset, tmp_path):
    folder = broken(hf_folder, tmp_path)
    for file in folder.glob("model-*.safetensors"):
        tensors = load_file(file)
        if "model.layers.0.mlp.down_proj.weight" in tensors:
            tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(48, 90)
            save_file(tensors, file, metadata={"format": "pt"})
    settings = [f"data.path={dataset.path}", f"model.path={folder}", f"output={tmp_path / 'scores'}"]
    with pytest.raises(Exception, match="down_proj.*does not fit"):
        shared_ranks(1).run(call_verb, "megatron_kd.scoring.score_corpus", "ScoreCorpusConfig", settings)
