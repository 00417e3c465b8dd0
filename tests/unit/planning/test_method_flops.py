"""Sums of a run's cost; what generation costs by torch's own counter (whole methods: tests/distributed/methods)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_kd.costs.flops import RunCost, training_flops


def test_sums_of_a_run():
    cost = RunCost("gkd", student_parameters=10, teacher_parameters=30, positions=64, seq_length=8)
    assert cost.flops_per_token == 6 * 10 + 2 * 30
    assert cost.total(5, student_texts=16, teacher_texts=8) == 120 * 64 * 5 + 2 * 10 * 8 * 16 + 2 * 30 * 8 * 8
    minillm = RunCost("minillm", 10, 30, positions=64, seq_length=8)
    assert minillm.total(5, 40, 40) == training_flops(10, 64 * 5, "minillm", 30) == (80 + 120) * 320
    assert minillm.total(4, 16, 16) == (60 + 60) * 256 + (20 + 60) * 128, "two steps on each rollout"
    beside = RunCost("minillm", 10, 30, 64, 8, has_pretraining=True, pretraining_has_teacher=True)
    assert beside.flops_per_token == 60 + 60 + 60 + 60
    plain = RunCost("none", 10, 0, positions=64, seq_length=8)
    assert plain.total(3, 0, 0) == 60 * 64 * 3


def test_generation_costs_two_operations_a_parameter_and_token():
    """Weights' products of a prompt pass and of decoding token by token, by torch's counter."""
    import dataclasses

    import numpy as np

    from megatron_kd.generation import Decoder, ModelPolicy, generate
    from megatron_kd.parallel.runtime import distributed_runtime
    from tests.reference.one_rank import TINY, tiny_model

    rows, length, architecture = 4, 48, dataclasses.replace(TINY, num_layers=6)
    with distributed_runtime():
        model = tiny_model(architecture)
        policy = ModelPolicy(Decoder([model], model.pg_collection, rows, length))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            generate(
                policy, [np.arange(1, 25)] * rows, np.arange(rows, dtype=np.uint64), max_length=length, eos_id=None,
                pad_id=0,
            )  # fmt: skip
    formula = 2 * architecture.parameters * rows * length
    # head and last MLP are applied to drawn positions only, the head's rows are padded; the formula has no attention
    assert counter.get_total_flops() == pytest.approx(formula, rel=0.25), counter.get_total_flops() / formula
