"""One step against autograd on whole logits: loss, norm, KD/LM gradient ratio; what is not finite changes nothing."""

from dataclasses import replace

import numpy
import pytest
import torch

from megatron_kd.config import from_mapping
from megatron_kd.data.batch import make_batch
from megatron_kd.errors import ConfigError, NonFiniteLossError
from megatron_kd.losses import linear_distillation_loss
from megatron_kd.models.gpt import full_logits
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.teachers.colocated import ColocatedTeacher
from megatron_kd.teachers.routing import Routing
from megatron_kd.training import objective
from megatron_kd.training.distillation_config import LossConfig
from megatron_kd.training.methods.method_builders import build_lm_term
from megatron_kd.training.objective import DistillationLoss, FusedLoss, MicroBatchLoss, build_objective
from megatron_kd.training.train_config import TrainConfig
from megatron_kd.training.train_step import TrainStep
from tests.distributed.training.runs import VOCABULARY
from tests.reference.one_rank import TrainingParts, tiny_model, train_config


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


RATIO = 0.3


def make_distilling_parts(dataset, runtime, reduction="token", precision="fp32"):
    config = train_config(
        dataset,
        training={"global_batch_size": 4, "micro_batch_size": 2, "loss_reduction": reduction, "precision": precision},
        distillation={"method": "vanilla_kd", "kd_ratio": RATIO},
        teacher={"placement": "colocated", "path": "unused"},
        metrics={"kd_lm_gradient_ratio_interval": 1},
    )
    return TrainingParts(dataset, runtime, config=config, precision=precision)


def make_distilling_step(parts, teacher):
    routing = Routing(parts.layout, parts.layout, [0], [0])
    placed = ColocatedTeacher(
        [teacher], parts.groups, student_groups=parts.groups, routing=routing, head=teacher.output_head()
    )
    return TrainStep(
        model=parts.model, optimizer=parts.optimizer, groups=parts.groups, teacher=placed, clip_grad=1.0,
        micro_batch_loss=parts.micro_batch_loss(placed),
        lm_term=build_lm_term(parts.config, FusedLoss(parts.groups)),
    )  # fmt: skip


def expected_ratio(parts, teacher, batches, reduction):
    """Norms of autograd's gradients of both terms, from logits of the whole vocabulary."""
    terms = torch.zeros(2, dtype=torch.float64)
    mask = torch.cat([batch.loss_mask for batch in batches]).double()
    weights = mask / mask.sum() if reduction == "token" else mask / mask.sum(1, keepdim=True) / len(mask)
    for batch, part in zip(batches, weights.split(2)):
        model = parts.model[0].module
        hidden = model(batch.tokens, batch.position_ids, None).transpose(0, 1)
        q = (hidden @ model.output_head().weight[:VOCABULARY].t()).double().log_softmax(-1)
        p = full_logits(teacher, batch.tokens).double().log_softmax(-1).detach()
        lm = -q.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
        kd = (p.exp() * (p - q)).sum(-1)
        terms = terms + torch.stack([(lm * part).sum() * (1 - RATIO), (kd * part).sum() * RATIO])
    parameters = list(parts.model[0].module.parameters())
    norms = []
    for term in terms:
        found = torch.autograd.grad(term, parameters, retain_graph=True)
        norms.append(torch.stack([gradient.double().norm() for gradient in found]).norm())
    return float(norms[1] / norms[0])


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_it_is_the_quotient_of_autograds_norms(dataset, reduction):
    with distributed_runtime() as runtime:
        parts, teacher = make_distilling_parts(dataset, runtime, reduction), tiny_model(seed=5)
        batches = micro_batches(dataset)
        expected = expected_ratio(parts, teacher, batches, reduction)
        result = make_distilling_step(parts, teacher)(batches, 1e-3, with_gradient_ratio=True)
    assert result.extra["kd_lm_gradient_ratio"] == pytest.approx(expected, rel=1e-4)
    assert not 0.95 < expected / (RATIO / (1 - RATIO)) < 1.05, "the weights alone would pass"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_measures_it_is_the_same_to_the_bit(dataset, precision):
    ends = []
    for measures in (False, True):
        with distributed_runtime() as runtime:
            parts, teacher = (
                make_distilling_parts(dataset, runtime, precision=precision),
                tiny_model(seed=5, precision=precision),
            )
            step = make_distilling_step(parts, teacher)
            results = [step(micro_batches(dataset), 1e-2, with_gradient_ratio=measures) for _ in range(2)]
            assert all(("kd_lm_gradient_ratio" in result.extra) == measures for result in results)
            ends.append((
                [(result.loss, result.kd_loss, result.grad_norm) for result in results],
                [parameter.detach().clone() for parameter in parts.model[0].parameters()],
            ))  # fmt: skip
    (plain, weights), (measured, same_weights) = ends
    assert plain == measured
    assert all(torch.equal(a, b) for a, b in zip(weights, same_weights, strict=True))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metrics": {"kd_lm_gradient_ratio_interval": 0}}, "at least 1, not 0"),
        ({"distillation": {"method": "none"}, "teacher": {}}, "needs a loss of an LM and a distillation term"),
        ({"distillation": {"method": "vanilla_kd", "kd_ratio": 1.0}}, "'distillation.kd_ratio' between 0 and 1"),
        ({"distillation": {"method": "gkd"}}, "'distillation.kd_ratio' between 0 and 1"),
        ({"distillation": {"method": "minillm"}}, "needs a loss of an LM and a distillation term"),
    ],
)
def test_where_there_are_not_two_terms_it_is_refused(keys, message):
    tree = {
        "data": {"path": "d"}, "output": "o", "model": {"name": "qwen_toy_student"},
        "metrics": {"kd_lm_gradient_ratio_interval": 10},
        "distillation": {"method": "vanilla_kd"}, "teacher": {"placement": "colocated", "path": "t"}, **keys,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        from_mapping(TrainConfig, tree, "test")
