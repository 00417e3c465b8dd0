"""Before anything is built: a run that cannot fit is refused with every number; accelerated parts are named."""

import dataclasses

import pytest
import torch

from megatron_kd.config import from_mapping
from megatron_kd.errors import ConfigError
from megatron_kd.models.architecture import architecture_by_name
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.training import preflight
from megatron_kd.training.train_config import TrainConfig
from tests.reference.one_rank import training_run

STUDENT, TEACHER = architecture_by_name("qwen_500m"), architecture_by_name("qwen_1.8b")


def config(**teacher):
    return from_mapping(
        TrainConfig,
        {
            "data": {"path": "x"}, "output": "y", "model": {"name": "qwen_500m"},
            "distillation": {"method": "vanilla_kd"},
            "training": {"global_batch_size": 64, "micro_batch_size": 8, "precision": "bf16"},
            "teacher": {"path": "z", **teacher},
        },
        "test",
    )  # fmt: skip


def run_of(layout, architecture=STUDENT, teacher=TEACHER, seq_length=1024, **keys):
    return training_run(
        config(**keys), architecture=architecture, layout=layout, teacher_architecture=teacher, seq_length=seq_length
    )


def memory(layout, rank, **teacher):
    return preflight.rank_memory(run_of(layout, **teacher), rank, "cuda")


def test_the_teachers_weights_and_waiting_hidden_states():
    one = ParallelLayout(1, 1, 1, 1)
    here = memory(one, 0, placement="colocated")
    assert here.teacher_weights == pytest.approx(2 * TEACHER.parameters, rel=1e-3)
    halves = memory(ParallelLayout(1, 1, 1, 2), 0, placement="colocated", tensor_model_parallel_size=2)
    assert halves.teacher_weights == pytest.approx(TEACHER.parameters + 2 * 151_936 * 2048, rel=1e-3)
    away = memory(one, 0, placement="remote", num_ranks=1, prefetch_depth=3)
    assert away.teacher_weights == pytest.approx(2 * 151_936 * 2048, rel=1e-3)
    assert away.teacher_activations == 3 * 8 * 1024 * 2048 * 2
    assert memory(one, 0, placement="remote", num_ranks=1, payload="sampled").teacher_weights == 0
    first, last = (memory(ParallelLayout(1, 2, 1, 1), rank, placement="colocated") for rank in (0, 1))
    assert last.teacher_activations - first.teacher_activations == 8 * 8 * 1024 * 2048 * 2


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(preflight, "device_bytes", lambda _: 10e9)
    layout = ParallelLayout(1, 1, 1, 1)
    with pytest.raises(ConfigError, match=r"stage 0\) needs .* \(weights 9\d\d, .*teacher weights 3,67\d.*9,500"):
        preflight.check_memory(run_of(layout, placement="colocated"))
    small = dataclasses.replace(STUDENT, num_layers=1, vocab_size=1024)
    preflight.check_memory(run_of(layout, small, None, 64, placement="colocated"))


def test_a_remote_teachers_own_ranks(monkeypatch):
    own = ParallelLayout(1, 2, 1, 1)
    run = run_of(ParallelLayout(1, 1, 1, 1), placement="remote", num_ranks=2, prefetch_depth=3)
    first, last = (preflight.teacher_rank_memory(run, own, rank, TEACHER) for rank in (0, 1))
    assert first.teacher_weights + last.teacher_weights == pytest.approx(2 * TEACHER.parameters, rel=1e-3)
    assert first.weights == first.optimizer == first.loss == 0
    hand_off = 8 * 1024 * 2048 * 2
    assert last.teacher_activations - first.teacher_activations == 3 * hand_off
    monkeypatch.setattr(preflight, "device_bytes", lambda _: 2e9)
    with pytest.raises(ConfigError, match=r"teacher rank 0 .*stage 0\) needs .*teacher weights .*1,900: use a larger"):
        preflight.check_teacher_ranks(run, own, TEACHER)
    monkeypatch.setattr(preflight, "device_bytes", lambda _: 10e9)
    preflight.check_teacher_ranks(run, own, TEACHER)


def test_a_cached_teacher_covers_one_dataset():
    tree = {
        "output": "y", "model": {"name": "qwen_toy_student"}, "distillation": {"method": "vanilla_kd"},
        "teacher": {"placement": "cached", "cache_path": "z"},
    }  # fmt: skip
    for data in ({"path": ["a", "b"]}, {"path": "a", "weights": [1.0]}):
        with pytest.raises(ConfigError, match="'data.path' blends datasets, .* cached covers one dataset"):
            from_mapping(TrainConfig, {**tree, "data": data}, "test")
    from_mapping(TrainConfig, {**tree, "data": {"path": ["a"]}}, "test")


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """A machine with these libraries, on which these are picked."""

    def set_up(installed, adam="torch.optim.adamw", triton=False):
        class Adam:
            __module__ = adam

        monkeypatch.setattr(preflight, "_is_installed", lambda name: name in installed)
        monkeypatch.setattr(preflight.megatron_optimizer, "Adam", Adam)
        monkeypatch.setattr(preflight, "use_triton", lambda backend, device: triton)

    return set_up


def test_a_cpu_says_what_computes_and_nothing_about_parts_that_it_cannot_use(machine):
    machine({"triton"})
    parts = preflight.optional_parts("local", CPU)
    assert preflight.chosen("local", parts) == "local layers, AdamW of torch, losses in PyTorch"
    assert preflight.notice(parts, CPU) is None


def test_a_part_that_is_installed_and_not_picked_is_named(machine):
    machine({"triton"})
    said = preflight.notice(preflight.optional_parts("local", CUDA), CUDA)
    assert said == (
        "accelerated parts: the losses' Triton kernels installed but not in use; without a recorded GPU run of this "
        "project: the losses' Triton kernels"
    )


def test_the_loss_backend_that_was_asked_for_is_the_one_in_use(machine):
    machine({"triton"}, triton=True)
    parts = preflight.optional_parts("local", CUDA, "torch")
    assert "Triton kernels installed but not in use" in preflight.notice(parts, CUDA)
    machine({"triton"})
    parts = preflight.optional_parts("local", CPU, "triton")
    assert preflight.chosen("local", parts).endswith("losses in Triton")
    assert "Triton kernels in use" in preflight.notice(parts, CPU)


def test_nothing_is_said_where_nothing_is_installed(machine):
    machine(set())
    assert preflight.notice(preflight.optional_parts("local", CUDA), CUDA) is None


def test_parts_in_use_are_named_until_they_are_recorded(machine, monkeypatch):
    machine({"transformer_engine", "triton"}, "transformer_engine.pytorch.optimizers", triton=True)
    parts = preflight.optional_parts("te", CUDA)
    said = preflight.notice(parts, CUDA)
    assert said.count(" in use") == 3 and "transformer_engine's FusedAdam in use" in said
    assert said.endswith("compare with a run without them (model.layer_spec=local)")
    assert preflight.chosen("te", parts) == "te layers, transformer_engine's FusedAdam, losses in Triton"
    monkeypatch.setattr(preflight, "RECORDED", frozenset({preflight.LAYERS}))
    untried = preflight.notice(parts, CUDA).partition("project: ")[2]
    assert preflight.LAYERS not in untried and preflight.TRITON in untried
    monkeypatch.setattr(preflight, "RECORDED", frozenset(part.name for part in parts))
    assert preflight.notice(parts, CUDA) is None
