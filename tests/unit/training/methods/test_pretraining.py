"""The pre-training loss beside generated text: its scale, and that it is not counted in the divisor."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_kd.losses import LM_ONLY, DistillationObjective
from megatron_kd.training.methods.method_table import MiniLLMConfig
from megatron_kd.training.methods.minillm import MiniLLMLoss
from megatron_kd.training.methods.pretraining import PretrainingBeside, PretrainingLoss, PretrainingShare
from megatron_kd.training.methods.source import Place, StepBatches
from megatron_kd.training.objective import FusedLoss, MicroBatchLoss, token_weights
from tests.unit.training.methods.made_batches import (
    DP_GROUPS,
    LOSS_GROUPS,
    Case,
    dataset_batches,
    micro_batch,
    sums_of,
    texts,
)


class Main:
    """A source that gives the same batch whatever the dataset's."""

    after_evaluation = state = restore = None

    def __init__(self, batch):
        self.batch = batch

    def batches(self, place, dataset):
        return StepBatches([self.batch])


def token_count(batch):
    return token_weights(batch, "token")[1]


def test_pretraining_beside_is_scaled_to_its_own_mean():
    """Divided by the main batches' count, the scaled sum must be the weight times the dataset's mean."""
    (main,), dataset = dataset_batches(), [micro_batch(texts(4))]
    main.loss_mask[:, 2:] = 0
    made = PretrainingBeside(Main(main), 0.3, DP_GROUPS, token_count, token_count).batches(Place(0, 1, 0), dataset)
    assert made.batches[0] is main and len(made.batches) == 2
    losses = torch.rand(dataset[0].loss_mask.shape)
    summed = (losses * dataset[0].loss_mask).sum() * made.batches[1].payload.scale
    mean = (losses * dataset[0].loss_mask).sum() / dataset[0].loss_mask.sum()
    assert float(summed / main.loss_mask.sum()) == pytest.approx(0.3 * float(mean))


def test_an_empty_main_batch_leaves_the_scale_finite():
    (main,) = dataset_batches()
    main.loss_mask.zero_()
    source = PretrainingBeside(Main(main), 1.0, DP_GROUPS, token_count, token_count)
    assert np.isfinite(source.batches(Place(0, 1, 0), dataset_batches()).batches[1].payload.scale)


def test_the_pretraining_loss_beside_is_scaled_and_not_counted():
    case = Case()
    loss = PretrainingLoss(LM_ONLY, FusedLoss(LOSS_GROUPS), "token")
    beside = dataclasses.replace(case.batch, payload=PretrainingShare(0.25))
    scaled, count, sums = sums_of(loss, beside, case)
    log_q, _ = case.log_probabilities()
    expected = -0.25 * (case.of_labels(log_q) * case.mask).sum()
    assert int(count) == 0 and float(scaled) == pytest.approx(float(expected), rel=1e-9) == float(sums["pretraining"])
    whole = MicroBatchLoss({"main": MiniLLMLoss(MiniLLMConfig(), FusedLoss(LOSS_GROUPS)), "pretraining": loss}, None)
    assert not whole.needs_knowledge(beside) and whole.needs_knowledge(case.batch)
    assert whole.extra == ("policy", "reward", "clipped", "pretraining")
    assert PretrainingLoss(DistillationObjective(kd_weight=0.5), FusedLoss(LOSS_GROUPS), "token").uses_teacher
