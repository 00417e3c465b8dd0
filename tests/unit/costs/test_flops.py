"""FLOP accounting against the step counts that the MiniPLM paper's sizes give, and against torch's own counter.

Whole methods: tests/distributed/methods/test_costs.py.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_kd.costs.flops import (
    RunCost,
    difference_sampling_flops,
    forward_flops,
    matched_steps,
    training_flops,
)
from megatron_kd.generation.decoder import Decoder
from megatron_kd.generation.generate import ModelPolicy, generate
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.methods.method_table import METHODS
from tests.reference.one_rank import TINY, tiny_model

TEACHER = 1_800_000_000
STEPS = 100_000
COSTS = {name: method.cost for name, method in METHODS.items()}


@pytest.mark.parametrize(
    ("student", "vanilla_kd", "minillm"),
    [(200_000_000, 25_000, 13_636), (500_000_000, 45_455, 26_786), (1_200_000_000, 66_667, 42_857)],
)
def test_matched_steps_of_the_paper_sizes(student: int, vanilla_kd: int, minillm: int) -> None:
    assert matched_steps(STEPS, student, TEACHER, COSTS["vanilla_kd"]) == vanilla_kd
    assert matched_steps(STEPS, student, TEACHER, COSTS["minillm"]) == minillm
    assert matched_steps(STEPS, student, TEACHER, COSTS["none"]) == STEPS


@pytest.mark.parametrize("method", ["none", "vanilla_kd", "minillm"])
def test_matched_steps_cost_the_same(method: str) -> None:
    tokens_per_step = 4_096
    steps = matched_steps(STEPS, 500_000_000, TEACHER, COSTS[method])
    plain = training_flops(500_000_000, STEPS * tokens_per_step)
    cost = training_flops(500_000_000, steps * tokens_per_step, COSTS[method], TEACHER)
    assert cost == pytest.approx(plain, rel=1 / steps)


def test_cost_per_token() -> None:
    assert training_flops(10, 1) == 60
    assert training_flops(10, 1, COSTS["vanilla_kd"], 100) == 60 + 200
    assert training_flops(10, 1, COSTS["minillm"], 100) == 80 + 400
    assert forward_flops(10, 7) == 140


def test_offline_cost_of_the_paper() -> None:
    # Scoring 100B tokens with a 104M reference model and training it on 5B tokens: 2.08e19 and 3.1e18.
    reference, scored, trained = 104_000_000, 100_000_000_000, 5_000_000_000
    assert forward_flops(reference, scored) == pytest.approx(2.08e19, rel=1e-9)
    assert training_flops(reference, trained) == pytest.approx(3.12e18, rel=1e-9)
    total = difference_sampling_flops(TEACHER, reference, scored, trained)
    assert total == pytest.approx(3.6e20 + 2.08e19 + 3.12e18, rel=1e-9)


def test_a_method_that_runs_a_teacher_needs_its_size() -> None:
    with pytest.raises(ValueError, match="costs 6 N_s [+] 2 N_t runs a teacher: teacher_parameters is 0"):
        matched_steps(10, 10, 0, COSTS["vanilla_kd"])


def test_formulas_read_as_in_the_paper() -> None:
    assert [str(COSTS[name]) for name in ("none", "vanilla_kd", "minillm")] == [
        "6 N_s", "6 N_s + 2 N_t", "8 N_s + 4 N_t",
    ]  # fmt: skip


def test_sums_of_a_run():
    cost = RunCost(COSTS["gkd"], student_parameters=10, teacher_parameters=30, positions=64, seq_length=8)
    assert cost.flops_per_token == 6 * 10 + 2 * 30
    assert cost.total(5, student_texts=16, teacher_texts=8) == 120 * 64 * 5 + 2 * 10 * 8 * 16 + 2 * 30 * 8 * 8
    minillm = RunCost(COSTS["minillm"], 10, 30, positions=64, seq_length=8)
    assert minillm.total(5, 40, 40) == training_flops(10, 64 * 5, COSTS["minillm"], 30) == (80 + 120) * 320
    assert minillm.total(4, 16, 16) == (60 + 60) * 256 + (20 + 60) * 128, "two steps on each rollout"
    beside = RunCost(COSTS["minillm"], 10, 30, 64, 8, has_pretraining=True, pretraining_has_teacher=True)
    assert beside.flops_per_token == 60 + 60 + 60 + 60
    plain = RunCost(COSTS["none"], 10, 0, positions=64, seq_length=8)
    assert plain.total(3, 0, 0) == 60 * 64 * 3


def test_generation_costs_two_operations_per_parameter_and_token():
    """Weights' products of a prompt pass and of decoding token by token, by torch's counter."""
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
    # The head and the last MLP see drawn positions only, the head's rows are padded; the formula omits attention.
    assert counter.get_total_flops() == pytest.approx(formula, rel=0.25), counter.get_total_flops() / formula
