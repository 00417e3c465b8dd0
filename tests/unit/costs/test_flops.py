"""FLOP accounting against the step counts that the MiniPLM paper's sizes give."""

import pytest

from megatron_kd.costs.flops import difference_sampling_flops, forward_flops, matched_steps, training_flops

TEACHER = 1_800_000_000
STEPS = 100_000


@pytest.mark.parametrize(
    ("student", "vanilla_kd", "minillm"),
    [(200_000_000, 25_000, 13_636), (500_000_000, 45_455, 26_786), (1_200_000_000, 66_667, 42_857)],
)
def test_matched_steps_of_the_paper_sizes(student: int, vanilla_kd: int, minillm: int) -> None:
    assert matched_steps(STEPS, student, TEACHER, "vanilla_kd") == vanilla_kd
    assert matched_steps(STEPS, student, TEACHER, "minillm") == minillm
    assert matched_steps(STEPS, student, TEACHER, "none") == STEPS


@pytest.mark.parametrize("method", ["none", "vanilla_kd", "minillm"])
def test_matched_steps_cost_the_same(method: str) -> None:
    tokens_per_step = 4_096
    steps = matched_steps(STEPS, 500_000_000, TEACHER, method)
    plain = training_flops(500_000_000, STEPS * tokens_per_step)
    cost = training_flops(500_000_000, steps * tokens_per_step, method, TEACHER)
    assert cost == pytest.approx(plain, rel=1 / steps)


def test_cost_per_token() -> None:
    assert training_flops(10, 1) == 60
    assert training_flops(10, 1, "vanilla_kd", 100) == 60 + 200
    assert training_flops(10, 1, "minillm", 100) == 80 + 400
    assert forward_flops(10, 7) == 140


def test_offline_cost_of_the_paper() -> None:
    # Scoring 100B tokens with a 104M reference model and training it on 5B tokens: 2.08e19 and 3.1e18.
    reference, scored, trained = 104_000_000, 100_000_000_000, 5_000_000_000
    assert forward_flops(reference, scored) == pytest.approx(2.08e19, rel=1e-9)
    assert training_flops(reference, trained) == pytest.approx(3.12e18, rel=1e-9)
    total = difference_sampling_flops(TEACHER, reference, scored, trained)
    assert total == pytest.approx(3.6e20 + 2.08e19 + 3.12e18, rel=1e-9)


def test_refuses_what_has_no_formula() -> None:
    with pytest.raises(ValueError, match="'seqkd'.*vanilla_kd"):
        training_flops(10, 1, "seqkd")
    with pytest.raises(ValueError, match="teacher_parameters is 0"):
        matched_steps(10, 10, 0, "vanilla_kd")
