"""``evaluate`` on a model whose figures are known in closed form."""

import json
import math

import pytest
import torch

from megatron_kd.config import from_mapping
from megatron_kd.errors import CheckpointError, ConfigError
from megatron_kd.evaluation.evaluate import run
from megatron_kd.evaluation.evaluate_config import EvaluateConfig
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.checkpoint import Progress
from tests.distributed.training.runs import VOCABULARY, make_dataset
from tests.reference.one_rank import TrainingParts
from tests.reference.saved_checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    """A dataset and the run folder of a model that finds every token equally likely: all weights of its head are 0."""
    root = tmp_path_factory.mktemp("uniform")
    dataset = make_dataset(root / "data", chunks=10)
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime)
        with torch.no_grad():
            parts.model[0].module.embedding.word_embeddings.weight.zero_()
        save_checkpoint(
            root / "run" / "checkpoints",
            Progress(1),
            parts.model,
            parts.optimizer,
            parts.groups,
            architecture=parts.architecture,
            about={"tokenizer_hash": dataset.tokenizer_hash, "seq_length": 32, "precision": "fp32"},
        )
    return dataset, root / "run"


def test_a_uniform_model_has_log_of_the_vocabulary(uniform, tmp_path, capsys):
    dataset, folder = uniform
    output = tmp_path / "new" / "figures.json"
    figures = run(
        from_mapping(
            EvaluateConfig,
            {"data": {"path": str(dataset.path)}, "model": {"path": str(folder)}, "output": str(output)},
            "test",
        )
    )
    assert figures["heldout_loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    bits = figures["tokens"] * math.log2(VOCABULARY) / figures["text_bytes"]
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert figures["text_bytes"] < figures["tokens"], "an eos that is predicted has no bytes"
    assert figures["dataset_fingerprint"] == dataset.fingerprint and figures["model"].endswith("step_1")
    assert json.loads(output.read_text()) == json.loads(capsys.readouterr().out) == figures


def test_bad_settings_are_refused(uniform, tmp_path):
    dataset, folder = uniform
    config = {"data": {"path": str(dataset.path)}, "model": {"path": str(tmp_path / "none")}}
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        run(from_mapping(EvaluateConfig, config, "test"))
    with pytest.raises(ConfigError, match="'micro_batch_size' must be at least 1"):
        from_mapping(EvaluateConfig, {**config, "micro_batch_size": 0}, "test")
