"""GKD: whose text a step trains on, and the loss against float64 autograd on whole logits."""

import pytest
import torch

from megatron_kd.training.distillation_config import DistillationConfig
from megatron_kd.training.methods.gkd import GKDSource
from megatron_kd.training.methods.method_table import GKDConfig
from megatron_kd.training.methods.source import Place
from megatron_kd.training.objective import DistillationLoss, FusedLoss, build_objective
from tests.reference import naive_losses
from tests.unit.training.methods.made_batches import LOSS_GROUPS, Case, Generator, dataset_batches, sums_of


def gkd(**keys):
    generator = Generator()
    policies = {"student": "student", "teacher": "teacher"}
    source = GKDSource(GKDConfig(**keys), generator, policies, seed=3, global_batch_size=4)
    return source, generator


@pytest.mark.parametrize(("fraction", "seq_kd"), [(0.0, False), (0.3, False), (0.7, True), (1.0, True)])
def test_gkd_takes_the_student_as_often_as_told(fraction, seq_kd):
    source, _ = gkd(student_fraction=fraction, seq_kd=seq_kd)
    origins = [source.origin(position) for position in range(2000)]
    assert abs(origins.count("student") / 2000 - fraction) < 0.04
    assert set(origins) - {"student"} <= ({"teacher"} if seq_kd else {"dataset"})
    assert fraction not in (0.0, 1.0) or len(set(origins)) == 1


def test_gkd_asks_the_right_generator_and_counts():
    source, generator = gkd(student_fraction=0.5, seq_kd=True)
    origins = [source.batches(Place(n, 20, n), dataset_batches()).facts["origin"] for n in range(20)]
    assert [policy for policy, *_ in generator.asked] == origins
    assert [batch for _, batch, _ in generator.asked] == list(range(20))
    assert source.counts.student == 4 * origins.count("student") > 0
    again, _ = gkd(student_fraction=0.5, seq_kd=True)
    again.restore(source.state())
    assert again.counts == source.counts


@pytest.mark.parametrize(("beta", "name"), [(0.5, "jsd"), (0.1, "jsd"), (0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_gkd_against_autograd_on_whole_logits(beta, name):
    case = Case()
    objective = build_objective(DistillationConfig(method="gkd", beta=beta))
    loss, count, sums = sums_of(DistillationLoss(objective, FusedLoss(LOSS_GROUPS), "token"), case.batch, case)
    ours = case.gradients(loss)
    log_q, log_p = case.log_probabilities()
    values = naive_losses.divergence(name, log_p.flatten(0, 1), log_q.flatten(0, 1), beta=beta)
    expected = (values * case.mask.flatten()).sum()
    for mine, theirs in zip(ours, case.gradients(expected), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)
    assert float(loss) == pytest.approx(float(expected), rel=1e-9) == float(sums["kd"])
    assert int(count) == int(case.mask.sum())
