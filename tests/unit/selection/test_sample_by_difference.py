import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts.manifest import read_manifest, write_manifest
from megatron_kd.cli import main
from megatron_kd.config import from_mapping
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import ConfigError, DataError
from megatron_kd.scoring.score_file import write_score_file
from megatron_kd.selection import sample_by_difference
from megatron_kd.selection.sample_by_difference import SampleByDifferenceConfig, run
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset
from tests.unit.conftest import die_at_call

# −log p, −log p_ref and r of the paper's instance table: three that it keeps, one that it discards
PAPER = [(1.26, 4.20, 2.94), (2.36, 5.59, 3.23), (0.16, 2.73, 2.57), (1.24, 1.28, 0.04)]

# the forked children use numpy and files alone, never the threads of the parent
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def score(folder: Path, values: np.ndarray, dataset: ChunkDataset, model: str, **changes: bool) -> Path:
    producer = {"tool": "test"}
    return write_score_file(folder, values, dataset, {"fingerprint": model}, "float32", producer, **changes).path


def config(folder: Path, ratio: float = 0.5, output: str = "out", **changes: str) -> SampleByDifferenceConfig:
    paths = {"teacher_scores": f"{folder}/teacher", "reference_scores": f"{folder}/reference", **changes}
    tree = {"data": {"path": f"{folder}/dataset"}, "ratio": ratio, "output": f"{folder}/{output}", **paths}
    return from_mapping(SampleByDifferenceConfig, tree, "test")


@pytest.fixture
def scored(tmp_path: Path, dataset: ChunkDataset) -> ChunkDataset:
    """Random scores for the 40 chunks, rounded so that differences tie; NaN where nothing counts."""
    generator = np.random.default_rng(11)
    teacher, reference = generator.integers(0, 5, (2, 40)).astype(np.float32)
    nothing = [index for index in range(40) if not dataset.has_unmasked_position(index)]
    assert nothing  # some chunks have one id
    teacher[nothing] = reference[nothing] = np.nan
    score(tmp_path / "teacher", teacher, dataset, "t")
    score(tmp_path / "reference", reference, dataset, "r")
    return dataset


def literal_selection(difference: np.ndarray, count: int) -> list[int]:
    candidates = [index for index in range(len(difference)) if not np.isnan(difference[index])]
    candidates.sort(key=lambda index: (-difference[index], index))
    return sorted(candidates[:count])


def test_the_papers_instances(tmp_path: Path) -> None:
    chunks = [np.array([number + 1, number + 2, 9]) for number in range(4)]
    dataset = write_chunk_dataset(tmp_path / "dataset", chunks, plain_tokenizer_info(10), 8)
    score(tmp_path / "teacher", np.array([row[0] for row in PAPER]), dataset, "1.8B")
    score(tmp_path / "reference", np.array([row[1] for row in PAPER]), dataset, "104M")
    for ratio, kept in ((0.25, [1]), (0.5, [0, 1]), (0.75, [0, 1, 2]), (0.99, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        out = ChunkDataset.open(run(config(tmp_path, ratio, f"out{ratio}")))
        assert out.chunk_ids.tolist() == kept
        threshold = json.loads((out.path / "selection.json").read_text())["threshold"]
        assert threshold == pytest.approx(min(PAPER[index][2] for index in kept), abs=1e-5)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 1.0])
def test_chunks_and_ids_are_kept_in_corpus_order(
    tmp_path: Path, scored: ChunkDataset, chunks: list[np.ndarray], ratio: float, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = ChunkDataset.open(run(config(tmp_path, ratio)))
    teacher, reference = (np.load(tmp_path / name / "scores.npy") for name in ("teacher", "reference"))
    expected = literal_selection(reference - teacher, int(ratio * 40))
    assert out.chunk_ids.tolist() == expected
    assert [out[index].tolist() for index in range(len(out))] == [chunks[index].tolist() for index in expected]
    assert out.root_fingerprint == scored.fingerprint != out.fingerprint
    assert [parent["kind"] for parent in out.manifest["parents"]] == ["chunk_dataset", "score_file", "score_file"]
    assert out.tokenizer_hash == scored.tokenizer_hash
    assert not any(scored.lengths[index] == 1 for index in expected)  # unscored chunks are never kept
    assert (out.path / "selection.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((out.path / "selection.json").read_text())
    assert (facts["kept"], facts["chunks"]) == (len(expected), 40)
    out.verify()
    assert capsys.readouterr().err.count("\n") == 1


def test_ids_refer_to_the_root_through_two_selections(tmp_path: Path, scored: ChunkDataset) -> None:
    """Scores of the root serve the selection, and the second selection's ids are the root's."""
    run(config(tmp_path, 0.5, "first"))
    second = from_mapping(
        SampleByDifferenceConfig,
        {
            "data": {"path": f"{tmp_path}/first"}, "ratio": 0.5, "output": f"{tmp_path}/second",
            "teacher_scores": f"{tmp_path}/teacher", "reference_scores": f"{tmp_path}/reference",
        },
        "test",
    )  # fmt: skip
    run(second)
    found = ChunkDataset.open(tmp_path / "second")
    assert found.root_fingerprint == scored.fingerprint
    for index, root in enumerate(found.chunk_ids.tolist()):
        np.testing.assert_array_equal(found[index], scored[root])
    teacher, reference = (np.load(tmp_path / name / "scores.npy") for name in ("teacher", "reference"))
    assert found.chunk_ids.tolist() == literal_selection(reference - teacher, 10)


def test_it_is_made_once_and_identical(
    tmp_path: Path, scored: ChunkDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(tmp_path))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    run(config(tmp_path))
    assert "already made" in capsys.readouterr().err
    with pytest.raises(DataError, match="not this same artefact"):
        run(config(tmp_path, 0.4))
    shutil.rmtree(tmp_path / "out")
    run(config(tmp_path))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main("sample_by_difference", arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def arguments_of(folder: Path, **changes: str) -> list[str]:
    values = {
        "data.path": f"{folder}/dataset", "teacher_scores": f"{folder}/teacher",
        "reference_scores": f"{folder}/reference", "output": f"{folder}/out", "ratio": "0.5", **changes,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def test_scores_of_another_corpus_are_refused(
    tmp_path: Path, scored: ChunkDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_chunk_dataset(tmp_path / "other", [np.array([1, 2])] * 40, plain_tokenizer_info(100), 16)
    score(tmp_path / "of_other", np.ones(40), other, "r")
    message = refusal(arguments_of(tmp_path, reference_scores=f"{tmp_path}/of_other"), capsys)
    assert scored.fingerprint in message and other.fingerprint in message and "of_other" in message
    assert not (tmp_path / "out").exists()


def test_scores_of_one_model_or_seen_differently_are_refused(
    tmp_path: Path, scored: ChunkDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(arguments_of(tmp_path, reference_scores=f"{tmp_path}/teacher"), capsys)
    assert "scores of the same model (t)" in message
    reference = np.load(tmp_path / "reference" / "scores.npy")
    score(tmp_path / "apart", reference, scored, "r", reset_attention_mask=True)
    message = refusal(arguments_of(tmp_path, reference_scores=f"{tmp_path}/apart"), capsys)
    assert "reset_attention_mask = False" in message and "with True" in message


@pytest.mark.parametrize("victim", ["dataset/chunks-00001.bin", "teacher/scores.npy", "dataset/manifest.json"])
def test_damaged_input_is_refused_and_leaves_nothing(
    tmp_path: Path, scored: ChunkDataset, victim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / victim
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    before = sorted(tmp_path.iterdir())
    assert Path(victim).name in refusal(arguments_of(tmp_path), capsys)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_scores_are_refused(
    tmp_path: Path, scored: ChunkDataset, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Written past the writer's own check, with right checksums, as another program might."""
    folder = tmp_path / "teacher"
    scores = np.load(folder / "scores.npy")
    place = int(np.flatnonzero(np.isfinite(scores))[2])
    scores[place] = value
    np.save(folder / "scores.npy", scores)
    manifest, checksums = read_manifest(folder)
    checksums.add_file(folder, "scores.npy")
    write_manifest(folder, manifest.pop("kind"), manifest, checksums)
    assert f"{folder}: the score of chunk {place} is {value} (1 of 40" in refusal(arguments_of(tmp_path), capsys)
    assert not (tmp_path / "out").exists()


def test_a_ratio_that_keeps_nothing_is_refused(tmp_path: Path, scored: ChunkDataset) -> None:
    with pytest.raises(DataError, match="ratio 0.01 keeps none of 40 chunks"):
        run(config(tmp_path, 0.01))
    for ratio in (0, 1.1, -0.5):
        with pytest.raises(ConfigError, match="ratio must be above 0 and at most 1"):
            config(tmp_path, ratio)


def test_killed_at_any_write_leaves_nothing_and_runs_again(tmp_path: Path, scored: ChunkDataset) -> None:
    expected = ChunkDataset.open(run(config(tmp_path, output="expected"))).fingerprint
    killed = 0
    while True:
        child = os.fork()
        if child == 0:
            die_at_call(os, "fsync", killed + 1)
            sample_by_difference.report_files = lambda *arguments: [("selection.png", b"drawn elsewhere")]
            run(config(tmp_path))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or (tmp_path / "out").exists():
            break
        killed += 1
    assert killed >= 5
    assert ChunkDataset.open(run(config(tmp_path))).fingerprint == expected
    assert not list(tmp_path.glob("out.tmp-*"))
