"""ECE against whole logits and a plain loop; closed forms."""

import numpy as np
import pytest
import torch

from megatron_kd.data.batch import make_batch
from megatron_kd.data.random_numbers import sequence_seeds
from megatron_kd.errors import DataError
from megatron_kd.evaluation.calibration import Calibration, bin_sums, calibration
from megatron_kd.evaluation.evaluate_config import ExposureConfig
from megatron_kd.evaluation.exposure_bias import ExposureBias, exposure_bias
from megatron_kd.generation.decoder import Decoder
from megatron_kd.generation.generate import ModelPolicy, generate
from megatron_kd.models.gpt import full_logits
from megatron_kd.parallel.runtime import distributed_runtime
from tests.distributed.training.runs import make_dataset
from tests.reference.one_rank import tiny_model


def error_of(confidence, right, bins=10):
    return Calibration(*bin_sums(torch.tensor(confidence), torch.tensor(right), bins)).error


def test_closed_forms():
    assert error_of([0.75] * 4, [1, 1, 1, 0]) == 0
    assert error_of([0.9] * 10, [1] * 5 + [0] * 5) == pytest.approx(0.4)
    # two bins, each wrong by 0.2, of opposite sign: they do not cancel
    assert error_of([0.8] * 5 + [0.4] * 5, [1] * 5 + [1] + [0] * 4) == pytest.approx(0.2)
    assert Calibration(*torch.zeros(3, 10)).error == 0


def test_edges_of_bins():
    sums = bin_sums(torch.tensor([0.0, 0.25, 0.2500001, 1.0]), torch.ones(4), 4)
    assert sums[0].tolist() == [2, 1, 0, 1]


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "chunks", chunks=11)


def test_against_whole_logits(dataset):
    with distributed_runtime() as runtime, torch.no_grad():
        model = tiny_model().eval()
        found = calibration([model], model.pg_collection, dataset, device=runtime.device, micro_batch_size=4)
        batch = make_batch(dataset, np.arange(11), dataset.seq_length)
        probabilities = full_logits(model, batch.tokens).softmax(-1)
    confidence, ids = probabilities.max(-1)
    mask = batch.loss_mask > 0
    right = (ids == batch.labels)[mask]
    expected, bins = 0.0, np.ceil(confidence[mask].double().numpy() * 15)
    for number in range(1, 16):
        inside = torch.from_numpy(bins == number)
        if inside.any():
            expected += abs(float(right[inside].double().mean() - confidence[mask][inside].double().mean())) * int(
                inside.sum()
            )
    assert found.error == pytest.approx(expected / int(mask.sum()), abs=1e-5)
    assert found.counts.sum() == mask.sum() and found.error > 0.01


def test_exposure_bias_against_whole_logits(dataset):
    config = ExposureConfig(num_texts=6, prompt_length=5, response_length=9)
    with distributed_runtime() as runtime, torch.no_grad():
        student, teacher = tiny_model(seed=1).eval(), tiny_model(seed=2).eval()
        groups = student.pg_collection
        found = exposure_bias([student], [teacher], groups, dataset, config, device=runtime.device, micro_batch_size=4)
        rows = np.flatnonzero(dataset.lengths >= 5)[:6]
        means = []
        for writer in (student, teacher):
            text = generate(
                ModelPolicy(Decoder([writer], groups, 6, 14)),
                [dataset[int(row)][:5] for row in rows],
                sequence_seeds(10, "exposure bias", rows),
                max_length=14,
                eos_id=None,
                pad_id=0,
            ).tokens
            log_q, log_p = (full_logits(model, text[:, :-1]).log_softmax(-1) for model in (student, teacher))
            means.append(float((log_p.exp() * (log_p - log_q)).sum(-1)[:, 4:].mean()))
    assert found.on_student_text == pytest.approx(means[0], rel=1e-4)
    assert found.on_teacher_text == pytest.approx(means[1], rel=1e-4)
    assert found.excess_accumulated_error == pytest.approx(100 * (means[0] / means[1] - 1), abs=0.05)


def test_prompts_that_no_chunk_has_are_refused(dataset):
    config = ExposureConfig(num_texts=6, prompt_length=34)
    with distributed_runtime() as runtime, pytest.raises(DataError, match="34 ids .* exposure.prompt_length"):
        model = tiny_model()
        exposure_bias([model], [model], model.pg_collection, dataset, config, device=runtime.device, micro_batch_size=4)


def test_a_model_that_is_its_own_teacher_has_no_error(dataset):
    config = ExposureConfig(num_texts=4, prompt_length=5, response_length=5)
    with distributed_runtime() as runtime:
        model = tiny_model()
        found = exposure_bias(
            [model], [model], model.pg_collection, dataset, config, device=runtime.device, micro_batch_size=4
        )
    assert found.on_student_text == pytest.approx(0, abs=1e-6) == found.on_teacher_text
    assert ExposureBias(0.0, 0.0).excess_accumulated_error == 0
