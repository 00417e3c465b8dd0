"""Conversion against a literal implementation of MiniPLM's rule; identity, order, refusals."""

import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.config import from_mapping
from megatron_kd.data import convert_tokenization
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.convert_tokenization import SOURCE_IDS_NAME, ConvertTokenizationConfig, run
from megatron_kd.data.tokenization import LoadedTokenizer, load_tokenizer, train_byte_level_bpe
from megatron_kd.errors import DataError
from megatron_kd.scoring.score_file import write_score_file
from tests.unit.conftest import die_at_call

LENGTH = 33
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A smaller vocabulary, so that chunks get longer; with a bos."""
    folder = train_byte_level_bpe(texts[3:9], 300, tmp_path_factory.mktemp("other") / "bpe300")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["bos_token"] = "<"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: LoadedTokenizer, texts: list[str]) -> ChunkDataset:
    """Real text cut at random places, eos ids inside, at the ends, doubled, and alone."""
    eos, ids = tokenizer.info.eos_id, []
    for text in texts[:6] + texts[-3:]:
        ids += [*tokenizer.backend.encode(text).ids, eos]
    stream = np.array(ids)
    lengths = np.random.default_rng(2).integers(1, LENGTH + 1, 120)
    chunks = [*np.split(stream, np.cumsum(lengths))[:120], np.array([eos]), np.array([eos, eos]), np.array([eos, 70])]
    chunks += [np.array([70, eos]), np.array([70, eos, eos, 71]), np.array([70])]
    with (
        building(tmp_path_factory.mktemp("root") / "root") as folder,
        closing(ChunkDatasetWriter(folder, tokenizer.info, LENGTH - 1, 50)) as writer,
    ):
        for chunk in chunks:
            writer.add(chunk, np.array([len(chunk)]))
        writer.add_domains(["a", "b"], np.arange(len(chunks)) % 2)
        writer.finish({"tool": "test"})
    return ChunkDataset.open(folder.parent / "root")


def literal(chunk: list[int], old: LoadedTokenizer, new: LoadedTokenizer, length: int, bos: bool) -> list[int]:
    """As MiniPLM's released script does it, one id at a time."""
    pieces: list[list[int]] = [[]]
    for token in chunk:
        if token == old.info.eos_id:
            pieces.append([])
        else:
            pieces[-1].append(token)
    ids: list[int] = []
    for piece in pieces:
        text = old.backend.decode(piece, skip_special_tokens=True)
        ids = ids + new.backend.encode(text, add_special_tokens=False).ids + [new.info.eos_id]
    ids = ids[:-1]
    ids = [new.bos_id, *ids[: length - 1]] if bos else ids[:length]
    return ids if len(ids) > 1 else [*ids, new.info.eos_id]


def convert(root: ChunkDataset, tokenizer: Path, output: Path, **keys: object) -> ChunkDataset:
    tree = {"data": {"path": str(root.path)}, "tokenizer": str(tokenizer), "output": str(output), "workers": 1, **keys}
    return ChunkDataset.open(run(from_mapping(ConvertTokenizationConfig, tree, "test")))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("seq_length", [None, 20, 200])
def test_equal_to_the_literal_rule(
    root: ChunkDataset, tokenizer: LoadedTokenizer, other_tokenizer: Path, tmp_path: Path, bos: bool, seq_length: int
) -> None:
    new = load_tokenizer(other_tokenizer)
    out = convert(root, other_tokenizer, tmp_path / "out", prepend_bos=bos, seq_length=seq_length)
    length = (seq_length or LENGTH - 1) + 1
    expected = [literal(root[index].tolist(), tokenizer, new, length, bos) for index in range(len(root))]
    assert [out[index].tolist() for index in range(len(out))] == expected
    assert out.tokenizer_hash == new.info.hash and out.seq_length == length - 1
    if seq_length is not None:
        assert (out.manifest["producer"]["tokens_cut_off"] > 0) == (seq_length == 20)
    assert out.domains.tolist() == root.domains.tolist()
    out.verify()


def test_text_survives_where_nothing_is_cut(
    root: ChunkDataset, tokenizer: LoadedTokenizer, other_tokenizer: Path, tmp_path: Path
) -> None:
    out = convert(root, other_tokenizer, tmp_path / "out", seq_length=500)
    new = load_tokenizer(other_tokenizer)
    for index in range(len(root)):
        text = tokenizer.backend.decode(root[index].tolist())
        assert new.backend.decode(out[index].tolist()) == text or "\ufffd" in text


def test_identity_maps_back_and_scores_of_old_ids_do_not_serve(
    root: ChunkDataset, other_tokenizer: Path, tmp_path: Path
) -> None:
    kept = np.array([3, 5, 8, 100])
    with building(tmp_path / "selected") as folder:
        writer = ChunkDatasetWriter(folder, root.tokenizer_info(), root.seq_length)
        for index in kept:
            writer.add(root[index], root.lengths[index : index + 1])
        writer.finish({"tool": "test"}, (), root.root_fingerprint, kept)
    out = convert(ChunkDataset.open(tmp_path / "selected"), other_tokenizer, tmp_path / "out")
    assert np.load(out.path / SOURCE_IDS_NAME).tolist() == kept.tolist()
    assert out.manifest["producer"]["source_root_fingerprint"] == root.fingerprint
    assert out.is_root and out.root_fingerprint == out.fingerprint != root.fingerprint
    assert out.manifest["parents"][0]["path"].endswith("selected")
    values = np.ones(len(root), np.float32)
    values[[index for index in range(len(root)) if not root.has_unmasked_position(index)]] = np.nan
    scores = write_score_file(tmp_path / "scores", values, root, {"fingerprint": "m"}, "float32", {"tool": "t"})
    with pytest.raises(DataError, match="holds scores of the dataset"):
        scores.check_matches(out)


def test_workers_change_no_byte(
    root: ChunkDataset, other_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = convert(root, other_tokenizer, tmp_path / "one")
    monkeypatch.setattr(convert_tokenization, "BLOCK_CHUNKS", 10)
    several = convert(root, other_tokenizer, tmp_path / "several")
    assert one.fingerprint == several.fingerprint
    assert convert(root, other_tokenizer, tmp_path / "two", workers=2).fingerprint == one.fingerprint


def test_refusals_and_what_is_made_already(
    root: ChunkDataset, other_tokenizer: Path, tokenizer_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with pytest.raises(DataError, match="is the tokenizer of .*; give another one"):
        convert(root, tokenizer_folder, tmp_path / "same")
    folder = Path(shutil.copytree(other_tokenizer, tmp_path / "without_bos"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="names no bos_token"):
        convert(root, folder, tmp_path / "bos", prepend_bos=True)
    convert(root, other_tokenizer, tmp_path / "out")
    convert(root, other_tokenizer, tmp_path / "out")
    assert "already made" in capsys.readouterr().err
    with pytest.raises(DataError, match="not this same"):
        convert(root, other_tokenizer, tmp_path / "out", seq_length=9)


def test_prompts_that_no_loss_counts_are_not_lost_silently(
    root: ChunkDataset, other_tokenizer: Path, tmp_path: Path
) -> None:
    info = root.tokenizer_info()
    with building(tmp_path / "pairs") as folder, closing(ChunkDatasetWriter(folder, info, 16)) as writer:
        writer.add(np.arange(1, 9), np.array([8]))
        writer.add_array("prompt_lengths.npy", np.array([3], np.int32))
        writer.mask_prompts = True
        writer.finish({"tool": "test"})
    with pytest.raises(DataError, match="leaves prompts out of the loss.*tokenize_corpus and the new tokenizer"):
        convert(ChunkDataset.open(tmp_path / "pairs"), other_tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_killed_at_any_write_leaves_nothing_and_runs_again(
    root: ChunkDataset, other_tokenizer: Path, tmp_path: Path
) -> None:
    expected = convert(root, other_tokenizer, tmp_path / "expected").fingerprint
    killed = 0
    while not (tmp_path / "out").exists():
        child = os.fork()
        if child == 0:
            die_at_call(os, "fsync", 2 * killed + 1)
            convert(root, other_tokenizer, tmp_path / "out")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
    assert killed >= 5
    assert convert(root, other_tokenizer, tmp_path / "out").fingerprint == expected
