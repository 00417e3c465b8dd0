"""One step against autograd on whole logits; a loss or norm that is not finite leaves the weights as they were."""

from dataclasses import replace

import numpy
import pytest
import torch

from megatron_kd.data.batch import make_batch
from megatron_kd.errors import NonFiniteLossError
from megatron_kd.losses import linear_distillation_loss
from megatron_kd.models.gpt import full_logits
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training import objective
from megatron_kd.training.distillation_config import LossConfig
from megatron_kd.training.objective import DistillationLoss, FusedLoss, MicroBatchLoss, build_objective
from megatron_kd.training.train_step import TrainStep
from tests.reference.one_rank import TrainingParts


def make_step(parts, reduction="token"):
    main = DistillationLoss(build_objective(parts.config.distillation), FusedLoss(parts.groups), reduction)
    return TrainStep(
        model=parts.model,
        optimizer=parts.optimizer,
        groups=parts.groups,
        micro_batch_loss=MicroBatchLoss({"main": main}, None),
        teacher=None,
        clip_grad=1.0,
    )


def micro_batches(dataset):
    """Chunk 0 is short, so the two micro-batches have different counts."""
    return [make_batch(dataset, numpy.array(rows), dataset.seq_length) for rows in ([0, 1], [2, 3])]


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_loss_and_norm_are_those_of_the_whole_batch(dataset, reduction):
    with distributed_runtime() as runtime:
        parts, batches = TrainingParts(dataset, runtime), micro_batches(dataset)
        losses = torch.cat(
            [
                torch.nn.functional.cross_entropy(
                    full_logits(parts.model[0].module, batch.tokens).transpose(1, 2).double(),
                    batch.labels,
                    reduction="none",
                )
                * batch.loss_mask
                for batch in batches
            ]
        )
        lengths = torch.cat([batch.loss_mask for batch in batches]).sum(1)
        expected = (losses.sum() / lengths.sum()) if reduction == "token" else (losses.sum(1) / lengths).mean()
        result = make_step(parts, reduction)(batches, 1e-3)
    assert lengths[0] != lengths[1]
    assert result.loss == pytest.approx(float(expected), rel=1e-6) == result.lm_loss
    assert result.tokens == int(lengths.sum()) and result.grad_norm > 0 and result.kd_loss == 0


def weights(parts):
    return [parameter.detach().clone() for parameter in parts.model[0].parameters()]


def moments(parts):
    adam = parts.optimizer.chained_optimizers[0].optimizer
    return [state["exp_avg"].clone() for state in adam.state.values()]


@pytest.mark.parametrize("fault", ["loss", "gradient norm"])
def test_what_is_not_finite_stops_before_the_weights_change(dataset, fault, monkeypatch):
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime)
        step, batches = make_step(parts), micro_batches(dataset)
        step(batches, 1e-3)
        if fault == "loss":
            next(parts.model[0].parameters()).detach()[5] = float("nan")
            batches[0].tokens[0, 0] = 5
        else:
            monkeypatch.setattr(type(parts.optimizer), "get_grad_norm", lambda self: torch.tensor(float("inf")))
        before, before_moments = weights(parts), moments(parts)
        with pytest.raises(NonFiniteLossError, match="is not finite"):
            step(batches, 1e-3)
        for old, new in zip(before + before_moments, weights(parts) + moments(parts), strict=True):
            assert torch.equal(old.nan_to_num(7), new.nan_to_num(7))


def test_steps_lower_the_loss_on_one_batch(dataset):
    with distributed_runtime() as runtime:
        step, batches = make_step(TrainingParts(dataset, runtime)), micro_batches(dataset)
        losses = [step(batches, 3e-3).loss for _ in range(15)]
    assert losses[-1] < losses[0] - 1


def test_rate_0_changes_nothing(dataset):
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime)
        before = weights(parts)
        make_step(parts)(micro_batches(dataset), 0.0)
        assert all(torch.equal(old, new) for old, new in zip(before, weights(parts), strict=True))


def test_the_keys_of_how_the_loss_runs_reach_it(dataset, monkeypatch):
    calls = []

    def spy(*arguments, **keywords):
        calls.append(keywords)
        return linear_distillation_loss(*arguments, **keywords)

    monkeypatch.setattr(objective, "linear_distillation_loss", spy)
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime)
        loss = LossConfig(backend="torch", tile_megabytes=3)
        config = replace(parts.config, distillation=replace(parts.config.distillation, loss=loss))
        batch = micro_batches(dataset)[0]
        parts.micro_batch_loss(config=config)(iter([batch]), parts.model[0])[1](hidden_of(parts, batch))
    assert [(call["tile_bytes"], call["backend"]) for call in calls] == [(3 << 20, "torch")]


def hidden_of(parts, batch):
    return parts.model[0](batch.tokens, batch.position_ids, None)
