"""The co-located teacher: one pass a micro-batch, nothing to train, nothing of it in the student's checkpoint."""

import dataclasses

import numpy
import pytest
import torch

from megatron_kd.data.batch import make_batch
from megatron_kd.models.gpt import full_logits
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.teachers.colocated import ColocatedTeacher, Stash
from megatron_kd.teachers.routing import Routing
from megatron_kd.training.checkpoint import Progress
from megatron_kd.training.train_step import TrainStep
from tests.distributed.training.runs import make_dataset
from tests.reference.full_state import load_full_state
from tests.reference.one_rank import TINY, TrainingParts, tiny_model
from tests.reference.saved_checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "chunks", chunks=16)


def colocated(model, parts):
    """A teacher of one rank, for a student of one rank."""
    routing = Routing(parts.layout, parts.layout, [0], [0])
    return ColocatedTeacher(
        [model], parts.groups, student_groups=parts.groups, routing=routing, head=model.output_head()
    )


def batches_of(dataset, count):
    return [make_batch(dataset, numpy.arange(4 * i, 4 * i + 4), dataset.seq_length) for i in range(count)]


def step_with(parts, teacher):
    distillation = dataclasses.replace(parts.config.distillation, method="vanilla_kd", kd_ratio=0.5)
    return TrainStep(
        model=parts.model,
        optimizer=parts.optimizer,
        groups=parts.groups,
        teacher=teacher,
        clip_grad=1.0,
        micro_batch_loss=parts.micro_batch_loss(teacher, dataclasses.replace(parts.config, distillation=distillation)),
    )


def test_a_step_passes_each_micro_batch_once_and_reports_the_divergence(dataset):
    with distributed_runtime() as runtime:
        parts, model = TrainingParts(dataset, runtime), tiny_model(seed=5)
        teacher, batches = colocated(model, parts), batches_of(dataset, 3)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        sums = numpy.zeros(3)
        for batch in batches:
            p = full_logits(model, batch.tokens).double().log_softmax(-1)
            q = full_logits(parts.model[0].module, batch.tokens).double().log_softmax(-1)
            mask = batch.loss_mask.double()
            sums += [
                float(((p.exp() * (p - q)).sum(-1) * mask).sum()),
                float((-(p.exp() * p).sum(-1) * mask).sum()),
                mask.sum(),
            ]
        result = step_with(parts, teacher)(batches, 1e-3)
        assert teacher.passes == 3
        assert result.kd_loss == pytest.approx(sums[0] / sums[2], rel=1e-5)
        assert result.teacher_entropy == pytest.approx(sums[1] / sums[2], rel=1e-5)
        assert result.loss == pytest.approx(0.5 * result.lm_loss + 0.5 * result.kd_loss, rel=1e-5)
        for old, parameter in zip(before, model.parameters(), strict=True):
            assert torch.equal(old, parameter) and not parameter.requires_grad and parameter.grad is None
        assert not model.training


def test_knowledge_is_hidden_states_in_the_order_of_the_students(dataset):
    with distributed_runtime() as runtime:
        parts, model = TrainingParts(dataset, runtime), tiny_model(seed=5)
        (batch,) = batches_of(dataset, 1)
        teacher = colocated(model, parts)
        teacher.begin_step([batch])
        knowledge = teacher.knowledge(batch)
        logits = knowledge.hidden @ knowledge.head.weight[:300].t()
        expected = full_logits(model, batch.tokens).transpose(0, 1).reshape(-1, 300)
    torch.testing.assert_close(logits, expected)
    assert not knowledge.hidden.requires_grad and knowledge.head.valid_vocab_size == 300


def test_no_teacher_tensor_in_the_students_checkpoint(dataset, tmp_path):
    deeper = dataclasses.replace(TINY, num_layers=3)
    with distributed_runtime() as runtime:
        parts = TrainingParts(dataset, runtime)
        teacher = colocated(tiny_model(deeper), parts)
        step_with(parts, teacher)(batches_of(dataset, 1), 1e-3)
        path = save_checkpoint(
            tmp_path / "checkpoints",
            Progress(1),
            parts.model,
            parts.optimizer,
            parts.groups,
            architecture=parts.architecture,
            about={"tokenizer_hash": "x", "seq_length": 32, "precision": "fp32"},
        )
        trained = sum(parameter.numel() for group in parts.optimizer.param_groups for parameter in group["params"])
        assert trained == sum(parameter.numel() for parameter in parts.model[0].parameters())
        _, state, _ = load_full_state(path)
    assert max(int(name.split(".")[2]) for name in state if ".layers." in name) == 1
    assert state["decoder.final_layernorm.weight"].shape == (parts.architecture.hidden_size,)


def test_beyond_the_budget_tensors_wait_in_host_memory_and_come_back():
    stash = Stash(device_bytes=2 * 40)
    values = [torch.full((10,), float(i)) for i in range(5)]
    for i, value in enumerate(values):
        stash.put(i, value)
    assert (stash.peak_device_bytes, stash.peak_host_bytes) == (80, 120)
    for i in (3, 0, 4):
        torch.testing.assert_close(stash.take(i), values[i])
    assert (stash.device_bytes, stash.host_bytes) == (40, 40)
    stash.put(5, values[0])
    assert stash.device_bytes == 80 and 5 in stash and 0 not in stash
    with pytest.raises(KeyError):
        stash.take(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_host_copies_are_pinned_and_come_back_to_the_device():
    stash = Stash(device_bytes=0)
    value = torch.randn(1000, device="cuda")
    stash.put("a", value.clone())
    assert stash._kept["a"][0].is_pinned()
    torch.testing.assert_close(stash.take("a"), value)
