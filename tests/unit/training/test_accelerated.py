"""What a run says at its start about accelerated parts: those in use, those only installed, those never tried."""

import pytest
import torch

from megatron_kd.training import preflight as accelerated

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """A machine with these libraries, on which these are picked."""

    def set_up(installed, adam="torch.optim.adamw", triton=False):
        class Adam:
            __module__ = adam

        monkeypatch.setattr(accelerated, "_is_installed", lambda name: name in installed)
        monkeypatch.setattr(accelerated.megatron_optimizer, "Adam", Adam)
        monkeypatch.setattr(accelerated, "use_triton", lambda backend, device: triton)

    return set_up


def test_a_cpu_says_what_computes_and_nothing_about_parts_that_it_cannot_use(machine):
    machine({"triton"})
    parts = accelerated.optional_parts("local", CPU)
    assert accelerated.chosen("local", parts) == "local layers, AdamW of torch, losses in PyTorch"
    assert accelerated.notice(parts, CPU) is None


def test_a_part_that_is_installed_and_not_picked_is_named(machine):
    machine({"triton"})
    said = accelerated.notice(accelerated.optional_parts("local", CUDA), CUDA)
    assert said == (
        "accelerated parts: the losses' Triton kernels installed but not in use; without a recorded GPU run of this "
        "project: the losses' Triton kernels"
    )


def test_the_loss_backend_that_was_asked_for_is_the_one_in_use(machine):
    machine({"triton"}, triton=True)
    parts = accelerated.optional_parts("local", CUDA, "torch")
    assert "Triton kernels installed but not in use" in accelerated.notice(parts, CUDA)
    machine({"triton"})
    parts = accelerated.optional_parts("local", CPU, "triton")
    assert accelerated.chosen("local", parts).endswith("losses in Triton")
    assert "Triton kernels in use" in accelerated.notice(parts, CPU)


def test_nothing_is_said_where_nothing_is_installed(machine):
    machine(set())
    assert accelerated.notice(accelerated.optional_parts("local", CUDA), CUDA) is None


def test_parts_in_use_are_named_until_they_are_recorded(machine, monkeypatch):
    machine({"transformer_engine", "triton"}, "transformer_engine.pytorch.optimizers", triton=True)
    parts = accelerated.optional_parts("te", CUDA)
    said = accelerated.notice(parts, CUDA)
    assert said.count(" in use") == 3 and "transformer_engine's FusedAdam in use" in said
    assert said.endswith("compare with a run without them (model.layer_spec=local)")
    assert accelerated.chosen("te", parts) == "te layers, transformer_engine's FusedAdam, losses in Triton"
    monkeypatch.setattr(accelerated, "RECORDED", frozenset({accelerated.LAYERS}))
    untried = accelerated.notice(parts, CUDA).partition("project: ")[2]
    assert accelerated.LAYERS not in untried and accelerated.TRITON in untried
    monkeypatch.setattr(accelerated, "RECORDED", frozenset(part.name for part in parts))
    assert accelerated.notice(parts, CUDA) is None
