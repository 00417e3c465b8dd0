"""Which role a document or chunk gets, what each output holds, and that nothing is lost between them."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.corpus_outputs import ROLES, CorpusOutputs, OutputSettings
from megatron_kd.data.encoded_parts import EncodedBlock
from megatron_kd.data.tokenization import LoadedTokenizer
from megatron_kd.errors import DataError

LENGTH = 9


def settings(folder: Path, **changes: object) -> OutputSettings:
    base = OutputSettings(
        seq_length=LENGTH - 1, chunking="packed", prepend_bos=False, flush_leftovers=True, shuffle=False, seed=0,
        chunks_per_shard=1000, split_by="document", heldout_fraction=0.25, reference_fraction=0.25,
        outputs={role: str(folder / role) for role in ROLES},
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def documents(count: int, seed: int = 1) -> EncodedBlock:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 30, count)
    return EncodedBlock(
        "f", 0, count, generator.integers(1, 500, lengths.sum()).astype("<u2"), lengths,
        ["even" if index % 2 else "odd" for index in range(count)],
        generator.integers(0, 1 << 64, count, dtype=np.uint64), np.zeros(0, np.int32), [], 0, 0,
    )  # fmt: skip


def made(given: OutputSettings, blocks: list[EncodedBlock], tokenizer: LoadedTokenizer) -> dict[str, ChunkDataset]:
    with CorpusOutputs(given, given.outputs, tokenizer, 1000).opened() as outputs:
        for block in blocks:
            outputs.add(block)
        outputs.finish({"tool": "test"}, [], "recipe")
    return {role: ChunkDataset.open(path) for role, path in given.outputs.items()}


def ids_of(dataset: ChunkDataset) -> list[int]:
    return [token for index in range(len(dataset)) for token in dataset[index].tolist()]


def test_a_hash_names_the_role(tmp_path: Path) -> None:
    places = np.array([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 0.9999])
    roles = settings(tmp_path).roles_at((places * 2.0**64).astype(np.uint64))
    assert [ROLES[role] for role in roles] == ["heldout", "heldout", "reference", "reference", "train", "train"]


@pytest.mark.parametrize("cuts", [[40], [7, 1, 32]])
def test_documents_go_whole_to_the_role_of_their_hash(
    tmp_path: Path, tokenizer: LoadedTokenizer, cuts: list[int]
) -> None:
    whole = documents(40)
    starts, bounds = np.cumsum([0, *whole.lengths]), np.cumsum([0, *cuts])
    blocks = [
        dataclasses.replace(
            whole,
            ids=whole.ids[starts[a] : starts[b]],
            lengths=whole.lengths[a:b],
            domains=whole.domains[a:b],
            split_hashes=whole.split_hashes[a:b],
        )
        for a, b in zip(bounds[:-1], bounds[1:])
    ]
    given = settings(tmp_path)
    found = made(given, blocks, tokenizer)
    roles = given.roles_at(whole.split_hashes)
    for number, role in enumerate(ROLES):
        mine = np.repeat(roles == number, whole.lengths)
        producer = found[role].manifest["producer"]
        missing = Counter(whole.ids[mine].tolist())
        missing.subtract(ids_of(found[role]))
        assert producer["role"] == role and min(missing.values()) == 0
        assert producer["leftover_tokens"] == missing.total() <= 2, "a domain's last id alone is no chunk"
        assert sorted(found[role].domain_names) == ["even", "odd"]


def test_chunks_go_to_the_role_of_their_number(tmp_path: Path, tokenizer: LoadedTokenizer) -> None:
    given = settings(tmp_path, split_by="chunk")
    found = made(given, [documents(60), documents(60, 2)], tokenizer)
    everything = made(
        settings(
            tmp_path / "all", outputs={"train": str(tmp_path / "all")}, heldout_fraction=0.0, reference_fraction=0.0
        ),
        [documents(60), documents(60, 2)],
        tokenizer,
    )["train"]
    chunks = {role: {tuple(dataset[i].tolist()) for i in range(len(dataset))} for role, dataset in found.items()}
    assert sum(map(len, found.values())) == len(everything) and min(map(len, found.values())) > 10
    assert set.union(*chunks.values()) == {tuple(everything[i].tolist()) for i in range(len(everything))}


def test_leftovers_are_dropped_and_counted_unless_flushed(tmp_path: Path, tokenizer: LoadedTokenizer) -> None:
    alone = {"outputs": {"train": str(tmp_path / "a")}, "heldout_fraction": 0.0, "reference_fraction": 0.0}
    block = documents(10)
    dropped = made(settings(tmp_path, flush_leftovers=False, **alone), [block], tokenizer)["train"]
    left = dropped.manifest["producer"]["leftover_tokens"]
    assert dropped.num_tokens + left == len(block.ids) and 0 < left < 2 * LENGTH
    assert set(dropped.lengths.tolist()) == {LENGTH}


def test_a_role_without_a_chunk_is_refused_and_nothing_appears(tmp_path: Path, tokenizer: LoadedTokenizer) -> None:
    given = settings(tmp_path / "out", heldout_fraction=1e-9, flush_leftovers=False)
    with pytest.raises(DataError, match="heldout documents make no whole chunk .*shorten data.seq_length"):
        made(given, [documents(40)], tokenizer)
    assert list((tmp_path / "out").iterdir()) == []
