"""Descriptions of datasets, score files and caches; lineage; verification."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.cli import main
from megatron_kd.config import from_mapping
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.tokenization import load_tokenizer
from megatron_kd.data.tokenize_corpus import TokenizeCorpusConfig
from megatron_kd.data.tokenize_corpus import run as tokenize
from megatron_kd.evaluation.inspect_dataset import (
    InspectDatasetConfig,
    describe_tail_mass,
    run,
)
from megatron_kd.scoring.score_file import write_score_file
from megatron_kd.selection.sample_by_difference import SampleByDifferenceConfig
from megatron_kd.selection.sample_by_difference import run as sample
from megatron_kd.teachers.cache.codecs import TopKCodec
from tests.distributed.training.runs import VOCABULARY, make_dataset
from tests.reference.caches import write_cache


@pytest.fixture
def artefacts(tmp_path: Path, corpus: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A corpus that was tokenised, scored twice and sampled: ``dataset``, ``teacher``, ``reference``, ``selection``."""
    tree = {
        "input": str(corpus),
        "tokenizer": str(tokenizer_folder),
        "output": f"{tmp_path}/dataset",
        "data": {"seq_length": 64},
    }
    tokenize(from_mapping(TokenizeCorpusConfig, tree, "test"))
    dataset = ChunkDataset.open(tmp_path / "dataset")
    for number, name in enumerate(("teacher", "reference")):
        scores = np.linspace(1, 2 + number, len(dataset))
        write_score_file(
            tmp_path / name, scores, dataset, {"path": name, "fingerprint": name}, "float32", {"tool": "test"}
        )
    tree = {
        "data": {"path": f"{tmp_path}/dataset"}, "output": f"{tmp_path}/selection",
        "teacher_scores": f"{tmp_path}/teacher", "reference_scores": f"{tmp_path}/reference",
    }  # fmt: skip
    sample(from_mapping(SampleByDifferenceConfig, tree, "test"))
    capsys.readouterr()
    return tmp_path


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main("inspect_dataset", list(arguments))
    found = capsys.readouterr()
    assert ended.value.code == status, found.err
    return found.out + found.err


def test_a_dataset_its_samples_and_its_lineage(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect(capsys, f"path={artefacts}/selection", "verify=true", "samples=2")
    selection, root = ChunkDataset.open(artefacts / "selection"), ChunkDataset.open(artefacts / "dataset")
    assert f"chunk dataset, fingerprint {selection.fingerprint}" in text
    assert f"{selection.num_chunks:,} in 1 shards" in text
    assert f"chunk ids    refer to {root.fingerprint}" in text
    decoded = load_tokenizer(selection.tokenizer_path).backend.decode(selection[0].tolist(), skip_special_tokens=False)
    assert f"\n  chunk 0      {decoded[:300]!r}\n" in text
    assert "← score file (teacher)" in text and f"dataset {root.fingerprint[:12]}" in text
    assert "every checksum agrees" in text
    assert "every checksum agrees" in inspect(capsys, "--verify", f"path={artefacts}/selection")
    text = inspect(capsys, f"path={artefacts}/dataset", "samples=0")
    assert "refer to this dataset" in text and "tokenize_corpus" in text and "checksum agrees" not in text


def test_a_score_file(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = inspect(capsys, f"path={artefacts}/teacher", "verify=true")
    assert "score file" in text and "mean 1.5000, 1.0000 to 2.0000 nats per token; 0 unscored" in text
    assert "mask_rule=input_is_not_pad" in text


def test_missing_and_changed_ancestors_are_marked(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(artefacts / "teacher")
    shutil.rmtree(artefacts / "reference")
    shutil.copytree(artefacts / "selection", artefacts / "keep")
    text = inspect(capsys, f"path={artefacts}/keep")
    assert text.count("(missing or not readable)") == 2
    shutil.rmtree(artefacts / "dataset")
    shutil.copytree(artefacts / "selection", artefacts / "dataset")
    assert "(replaced by" in inspect(capsys, f"path={artefacts}/keep")


def test_verify_reads_what_opening_does_not(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = artefacts / "dataset" / "chunks-00000.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    inspect(capsys, f"path={artefacts}/dataset", "samples=0")
    message = inspect(capsys, f"path={artefacts}/dataset", "samples=0", "verify=true", status=2)
    assert message.count("\n") == 1 and "chunks-00000.bin: block 0 has checksum" in message


def test_other_folders_are_refused(artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in inspect(capsys, f"path={artefacts}/none", status=2)
    assert "not a whole artefact" in inspect(capsys, f"path={artefacts}", status=2)
    assert "'samples' must not be negative" in inspect(capsys, f"path={artefacts}/dataset", "samples=-1", status=2)


def test_a_cache(tmp_path, capsys):
    dataset = make_dataset(tmp_path / "data", chunks=20)
    cache = write_cache(dataset, tmp_path / "cache", TopKCodec(4, VOCABULARY), chunks_per_shard=6)
    tails = np.concatenate([cache.read(row).tail for row in range(20)])
    run(InspectDatasetConfig(str(cache.path), verify=True))
    printed = capsys.readouterr().out
    for part in (
        f"logit cache, fingerprint {cache.fingerprint}",
        "20 in 4 shards",
        dataset.fingerprint,
        "top_k, the 4 most probable ids per token; 300 ids of 9 bits",
        "4.0 ids and ",
        cache.teacher_fingerprint,
        "temperature=1.0, compute_dtype=fp32, mask_rule=input_is_not_pad, reset_attention_mask=False",
        f"mean {tails.mean():.4f} over {cache.manifest['tokens']} tokens",
        "every checksum agrees",
    ):
        assert part in printed, (part, printed)


def test_the_histogram_counts_every_token():
    lines = describe_tail_mass(np.array([0.0, 5e-5, 0.3, 0.35, 1.0], dtype=np.float32))
    assert "mean 0.3300 over 5 tokens" in lines[0] and "50% 0.3," in lines[0]
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[1:]]
    assert shares == [40.0, 0, 0, 0, 0, 0, 40.0, 20.0]
