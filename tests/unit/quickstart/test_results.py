"""The report of real run folders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.config import load_config
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.evaluation.bigram import fit_bigram, score_bigram
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.quickstart import recipe as plan
from megatron_kd.quickstart.results import collect_report, model_result
from megatron_kd.training.train import TrainConfig, run
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

VOCABULARY, LENGTH, STEPS, BATCH = 40, 12, 4, 2


def write_data(path: Path, chunks: int, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    rows = [generator.integers(1, VOCABULARY, LENGTH + 1) for _ in range(chunks)]
    write_chunk_dataset(path, rows, plain_tokenizer_info(VOCABULARY), LENGTH)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/quickstart/data and one finished run."""
    root = tmp_path_factory.mktemp("quickstart")
    splits = {plan.TRAIN_DATA: 16, plan.HELDOUT_DATA: 4, plan.REFERENCE_DATA: 4, plan.SAMPLED_DATA: 8}
    for path, chunks in splits.items():
        write_data(root / path, chunks, seed=chunks)
    run(
        load_config(
            TrainConfig,
            None,
            [
                f"data.path={root / plan.TRAIN_DATA}",
                f"data.eval_path={root / plan.HELDOUT_DATA}",
                f"output={root / 'run'}",
                f"training.train_iters={STEPS}",
                f"training.global_batch_size={BATCH}",
                f"training.micro_batch_size={BATCH}",
                "training.eval_interval=2",
                "model.name=qwen_toy_reference",
            ],
        )
    )
    return root


def test_the_result_of_a_run_folder(trained: Path) -> None:
    result = model_result("MiniPLM", trained / "run", Path("hf"), offline_flops=7)
    parameters = architecture_by_name("qwen_toy_reference").with_vocab_size(VOCABULARY).parameters
    assert result.parameters == parameters
    assert (result.steps, result.train_tokens) == (STEPS, STEPS * BATCH * LENGTH)
    assert result.train_flops == 6 * parameters * result.train_tokens
    assert [point.flops for point in result.curve] == [result.train_flops / 2, result.train_flops]
    assert result.heldout_loss == result.curve[-1].loss
    assert result.heldout_loss == pytest.approx(np.log(VOCABULARY), rel=0.2)  # random ids, nothing to learn
    assert result.bits_per_byte == pytest.approx(result.heldout_loss / np.log(2), rel=1e-6)  # one byte per id
    assert result.seconds > 0 and (result.hf_path, result.offline_flops) == ("hf", 7)


def test_a_run_without_a_last_evaluation_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match="no evaluation at the last step"):
        model_result("MiniPLM", tmp_path / "run")


@pytest.fixture
def finished(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which every step has run, each with the same result."""
    shutil.copytree(trained / plan.ROOT, tmp_path / plan.ROOT)
    for step in plan.quickstart_steps(Path(__file__).resolve().parents[3]):
        if step.metrics is not None:
            shutil.copytree(trained / "run", tmp_path / step.metrics[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_report_of_a_finished_quickstart(finished: Path) -> None:
    report = collect_report(12.5, skipped_steps=3)
    assert [student.name for student in report.students] == [student.method for student in plan.STUDENTS]
    corpus = ChunkDataset.open(plan.TRAIN_DATA)
    reference = report.reference
    offline = 2 * (report.teacher.parameters + reference.parameters) * corpus.num_tokens + reference.train_flops
    assert {s.name: s.offline_flops for s in report.students} == {
        "Pre-Train w/o KD": 0,
        "Vanilla KD": 0,
        "MiniPLM": offline,
        "MiniPLM + Vanilla KD": offline,
    }
    expected = score_bigram(fit_bigram(corpus), ChunkDataset.open(plan.HELDOUT_DATA))
    assert report.bigram_loss == expected.loss
    assert report.noise_band == 0 and report.seconds == 12.5 and report.facts["steps done before"] == 3
    assert report.heldout == str(plan.HELDOUT_DATA)


def test_unequal_training_flops_are_refused(finished: Path) -> None:
    metrics = finished / plan.run_folder("miniplm") / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[-1]["train_flops"] *= 1.02
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="differ by more than 1%.*MiniPLM"):
        collect_report(1.0)
