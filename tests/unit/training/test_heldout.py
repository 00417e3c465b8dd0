"""The held-out divergence runs the loss as the configuration says."""

from types import SimpleNamespace

import torch

from megatron_kd.losses import DenseKnowledge, DistillationObjective, OutputHead, linear_distillation_loss
from megatron_kd.training import heldout, objective
from megatron_kd.training.distillation_config import LossConfig
from megatron_kd.training.objective import FusedLoss
from tests.reference.loss_cases import LossCase, build


class Model(SimpleNamespace):
    """What the loss asks of a student."""

    config = SimpleNamespace(sequence_parallel=False)

    def output_head(self):
        return self.head


def test_the_keys_of_how_the_loss_runs_reach_it(monkeypatch):
    calls = []

    def spy(*arguments, **keywords):
        calls.append(keywords)
        return linear_distillation_loss(*arguments, **keywords)

    monkeypatch.setattr(objective, "linear_distillation_loss", spy)
    case = LossCase("forward_kl", tokens=6)
    inputs = build(case)
    head = OutputHead(inputs.weight, case.vocab)
    knowledge = DenseKnowledge(inputs.teacher_hidden, OutputHead(inputs.teacher_weight, case.vocab))
    batch = SimpleNamespace(labels=inputs.labels.view(2, 3), loss_mask=inputs.weights.view(2, 3))
    fused = FusedLoss(SimpleNamespace(tp=None, cp=None), LossConfig(backend="torch", tile_megabytes=3))
    with torch.no_grad():
        sums = heldout._sums(
            Model(head=head), fused, SimpleNamespace(knowledge=lambda _: knowledge), DistillationObjective(0.0, 1.0),
            batch, inputs.hidden,
        )  # fmt: skip
    assert sums[0] > 0 and sums[3] == (inputs.weights != 0).sum()
    assert [(call["tile_bytes"], call["backend"]) for call in calls] == [(3 << 20, "torch")]
