"""The line about accelerated parts that nobody has recorded yet."""

import torch

from megatron_kd.training import accelerated


def test_nothing_is_said_on_a_cpu_without_the_libraries():
    parts = accelerated.parts_in_use("local", torch.device("cpu"))
    assert parts == [] and accelerated.warning(parts) is None


def test_each_part_is_named_until_it_is_recorded(monkeypatch):
    class FusedAdam:
        __module__ = "transformer_engine.pytorch.optimizers"

    monkeypatch.setattr(accelerated.megatron_optimizer, "Adam", FusedAdam)
    monkeypatch.setattr(accelerated, "use_triton", lambda backend, device: True)
    parts = accelerated.parts_in_use("te", torch.device("cuda"))
    said = accelerated.warning(parts)
    assert len(parts) == 3 and all(part in said for part in parts) and "transformer_engine's FusedAdam" in said
    assert "model.layer_spec=local" in said
    monkeypatch.setattr(accelerated, "RECORDED", frozenset(parts[:2]))
    assert accelerated.TRITON in accelerated.warning(parts) and "FusedAdam" not in accelerated.warning(parts)
