"""The dataset is the same bytes under every layout and batch size, and after a kill; training on it is SeqKD."""

import json
import shutil
from contextlib import closing

import numpy as np
import pytest

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.artefacts.manifest import read_manifest, write_manifest
from megatron_kd.data.chunk_dataset import PROMPT_LENGTHS_NAME, ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.errors import DataError
from tests.distributed.ranks import RankError, shared_ranks
from tests.distributed.training.runs import LAYOUTS, call_verb, make_dataset, train_in_ranks

VERB = ("megatron_kd.generation.generate_corpus", "GenerateCorpusConfig")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """23 chunks, some shorter than the prompt."""
    return make_dataset(tmp_path_factory.mktemp("data") / "chunks", chunks=23)


@pytest.fixture(scope="module")
def model(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    keys = ["model.name=qwen_toy_reference", "training.train_iters=10"]
    train_in_ranks("TP1 PP1", [f"data.path={dataset.path}", *keys], folder)
    return folder


def settings_of(dataset, model, output, *keys):
    return [f"data.path={dataset.path}", f"model.path={model}", f"output={output}", "prompt_length=12",
            "response_length=18", *keys]  # fmt: skip


def generate_in(layout, *arguments):
    world, keys = LAYOUTS[layout]
    output = arguments[2]
    shared_ranks(world).run(call_verb, *VERB, settings_of(*arguments, *keys))
    return ChunkDataset.open(output)


def interrupt_after(parts, settings):
    """Run the verb with parts of 5 texts, and die while the next one is written."""
    from megatron_kd.generation import generate_corpus
    from megatron_kd.generation.generate_corpus import GeneratedParts

    whole, size = GeneratedParts.save, generate_corpus.TEXTS_PER_PART

    def save(self, number, part):
        if number == parts:
            raise KeyboardInterrupt
        whole(self, number, part)

    generate_corpus.TEXTS_PER_PART, GeneratedParts.save = 5, save
    try:
        call_verb(*VERB, settings)
    except KeyboardInterrupt:
        return "interrupted"
    finally:
        generate_corpus.TEXTS_PER_PART, GeneratedParts.save = size, whole


@pytest.fixture(scope="module")
def generated(dataset, model, tmp_path_factory):
    return generate_in("TP1 PP1", dataset, model, tmp_path_factory.mktemp("generated") / "out")


def test_texts_begin_with_their_chunks_and_end_with_the_document(dataset, generated):
    assert generated.num_chunks == dataset.num_chunks
    endings = 0
    for number in range(dataset.num_chunks):
        prompt, text = dataset[number][:12], generated[number]
        np.testing.assert_array_equal(text[: len(prompt)], prompt)
        assert generated.prompt_lengths[number] == len(prompt) < len(text) <= len(prompt) + 18
        response = text[len(prompt) :]
        assert (response[:-1] != dataset.eos_id).all()
        assert len(response) == 18 or response[-1] == dataset.eos_id
        endings += response[-1] == dataset.eos_id
    assert 0 < endings < dataset.num_chunks


def test_lineage(dataset, generated):
    kinds = {parent["kind"]: parent for parent in generated.manifest["parents"]}
    assert kinds["chunk_dataset"]["fingerprint"] == dataset.fingerprint
    assert "checkpoints/step_10" in kinds["checkpoint"]["path"]
    assert generated.manifest["producer"]["config"]["sampling"]["temperature"] == 1.0
    assert generated.root_fingerprint == generated.fingerprint, "its chunks are not the corpus's"
    assert generated.tokenizer_hash == dataset.tokenizer_hash
    assert json.dumps(generated.manifest["producer"]["flops"]).isdigit()


@pytest.mark.parametrize("layout", ["DP2", "TP2", "PP2"])
def test_layouts_and_batch_sizes_give_the_same_dataset(layout, dataset, model, generated, tmp_path):
    ours = generate_in(layout, dataset, model, tmp_path / "out", "micro_batch_size=4")
    assert ours.fingerprint == generated.fingerprint


def test_a_killed_job_resumes_where_it_was(dataset, model, generated, tmp_path):
    settings = settings_of(dataset, model, tmp_path / "out")
    assert shared_ranks(1).run(interrupt_after, 2, settings) == ["interrupted"]
    assert not (tmp_path / "out").exists()
    parts = sorted(path.name for path in (tmp_path / "out.partial").iterdir())
    assert parts == [".writer.lock", "recipe.json", "texts-000000.part", "texts-000001.part"]
    before = (tmp_path / "out.partial" / parts[2]).stat().st_mtime_ns
    shared_ranks(1).run(interrupt_after, 3, settings)
    assert (tmp_path / "out.partial" / parts[2]).stat().st_mtime_ns == before
    shared_ranks(1).run(interrupt_after, 99, settings)
    assert ChunkDataset.open(tmp_path / "out").fingerprint == generated.fingerprint
    assert not (tmp_path / "out.partial").exists()


def test_parts_of_another_recipe_are_refused_and_stay(dataset, model, generated, tmp_path):
    settings = settings_of(dataset, model, tmp_path / "out")
    shared_ranks(1).run(interrupt_after, 2, [*settings, "seed=11"])
    unfinished = sorted(tmp_path.rglob("*.part"))
    with pytest.raises(RankError, match="another recipe .*seed 11 there"):
        shared_ranks(1).run(interrupt_after, 99, settings)
    assert unfinished and sorted(tmp_path.rglob("*.part")) == unfinished


def test_a_finished_one_is_left_and_another_recipe_refused(dataset, model, generated):
    time = (generated.path / "manifest.json").stat().st_mtime_ns
    again = generate_in("TP1 PP1", dataset, model, generated.path)
    assert (again.path / "manifest.json").stat().st_mtime_ns == time
    with pytest.raises(RankError, match="already exists"):
        generate_in("TP1 PP1", dataset, model, generated.path, "seed=11")


def test_prompts_of_the_dataset_itself(dataset, model, tmp_path):
    """A prompt/response dataset: its responses are left out, whatever ``prompt_length`` says."""
    own = np.random.default_rng(0).integers(1, dataset.lengths)
    with (
        building(tmp_path / "pairs") as folder,
        closing(ChunkDatasetWriter(folder, dataset.tokenizer_info(), dataset.seq_length)) as writer,
    ):
        for number in range(dataset.num_chunks):
            writer.add(dataset[number], dataset.lengths[number : number + 1])
        writer.add_array(PROMPT_LENGTHS_NAME, own.astype(np.int32))
        writer.finish({"tool": "test"})
    made = generate_in("TP1 PP1", ChunkDataset.open(tmp_path / "pairs"), model, tmp_path / "out")
    np.testing.assert_array_equal(made.prompt_lengths, own)
    assert own.max() > 12 and made.seq_length == max(dataset.seq_length, own.max() + 18 - 1)
    for number, length in enumerate(own):
        np.testing.assert_array_equal(made[number][:length], dataset[number][:length])
        assert length < len(made[number]) <= length + 18


def test_text_from_the_beginning(dataset, model, tmp_path):
    made = generate_in("TP1 PP1", dataset, model, tmp_path / "out", "prompt=begin", "num_texts=9", "stop_at_eos=false")
    assert made.num_chunks == 9 and set(made.lengths) == {19} and set(made.prompt_lengths) == {1}
    assert {made[number][0] for number in range(9)} == {dataset.eos_id}
    assert len({tuple(made[number]) for number in range(9)}) == 9


def test_text_from_the_models_own_first_id(dataset, model, tmp_path):
    """A converted Llama or Mistral has a BOS of its own."""
    shutil.copytree(model, tmp_path / "with_bos")
    folder = tmp_path / "with_bos/checkpoints/step_10"
    manifest, checksums = read_manifest(folder)
    write_manifest(folder, manifest["kind"], {**manifest, "bos_id": 5}, checksums)
    keys = ("prompt=begin", "num_texts=3", "prompt_length=40000")
    made = generate_in("TP1 PP1", dataset, tmp_path / "with_bos", tmp_path / "out", *keys)
    assert {made[number][0] for number in range(3)} == {5} and set(made.prompt_lengths) == {1}


def test_a_text_longer_than_the_model_is_refused(dataset, model, tmp_path):
    with pytest.raises(RankError, match="32768 positions"):
        generate_in("TP1 PP1", dataset, model, tmp_path / "out", "response_length=40000")
    assert not list(tmp_path.iterdir())


def test_training_on_it(dataset, generated, tmp_path):
    keys = [f"data.path={generated.path}", f"data.eval_path={dataset.path}", "training.train_iters=12",
            "model.name=qwen_toy_reference"]  # fmt: skip
    rows = [row for row in train_in_ranks("TP1 PP1", keys, tmp_path / "run") if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    masked = train_in_ranks("TP1 PP1", [*keys, "data.mask_prompt=true"], tmp_path / "masked")
    assert 0 < masked[0]["tokens"] < rows[0]["tokens"]


def test_masking_prompts_of_a_plain_corpus_is_refused(dataset, tmp_path):
    with pytest.raises(RankError, match="has no prompts") as refused:
        train_in_ranks(
            "TP1 PP1",
            [f"data.path={dataset.path}", "data.mask_prompt=true", "model.name=qwen_toy_reference"],
            tmp_path / "run",
        )
    assert DataError.__name__ in str(refused.value)
