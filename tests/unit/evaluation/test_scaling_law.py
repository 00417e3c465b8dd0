"""The law: the paper's table from its coefficients, known coefficients from exact and from noisy points."""

import numpy as np
import pytest

from megatron_kd.errors import DataError
from megatron_kd.evaluation.fit_scaling_law import ScalingLaw, fit_scaling_law

TOKENS = 20 * 100_000 * 524_288
# N, A_c, alpha_c, L_inf, L_1T, L_10T of MiniPLM (arXiv 2410.17215): plain, Vanilla KD, MiniPLM for each size.
TABLE = [
    (0.2e9, 2.19e7, 0.41, 3.30, 3.35, 3.32),
    (0.2e9, 9.77e7, 0.44, 3.34, 3.39, 3.35),
    (0.2e9, 8.56e10, 0.59, 3.25, 3.28, 3.26),
    (0.5e9, 2.73e8, 0.45, 3.06, 3.12, 3.08),
    (0.5e9, 3.14e8, 0.45, 3.05, 3.12, 3.07),
    (0.5e9, 6.64e9, 0.52, 3.03, 3.06, 3.04),
    (1.16e9, 1.88e8, 0.43, 2.91, 2.98, 2.94),
    (1.16e9, 1.10e10, 0.52, 2.90, 2.95, 2.91),
    (1.16e9, 4.29e8, 0.45, 2.86, 2.92, 2.88),
]


@pytest.mark.parametrize("row", TABLE)
def test_the_papers_table_from_its_coefficients(row):
    parameters, amplitude, alpha, floor, at_1t, at_10t = row
    law, one = ScalingLaw(amplitude, alpha, floor), 6 * parameters * TOKENS
    within = 0.01
    if row is TABLE[5]:  # 500M MiniPLM gives 3.074: its alpha is printed with two digits, 0.515 to 0.525 allow 3.06
        within = 0.0145
        assert ScalingLaw(amplitude, 0.525, floor).loss(one) == pytest.approx(at_1t, abs=0.01)
    assert law.loss(one) == pytest.approx(at_1t, abs=within)
    assert law.loss(10 * one) == pytest.approx(at_10t, abs=0.01)


def test_all_but_one_of_the_tables_losses_are_within_a_hundredth():
    off = [
        (row[:4], printed)
        for row in TABLE
        for printed, reach in zip(row[4:], (1, 10))
        if abs(ScalingLaw(*row[1:4]).loss(reach * 6 * row[0] * TOKENS) - printed) > 0.01
    ]
    assert off == [((0.5e9, 6.64e9, 0.52, 3.03), 3.06)]


@pytest.mark.parametrize("row", TABLE[::4])
def test_exact_points_give_their_coefficients_back(row):
    _, amplitude, alpha, floor, *_ = row
    law = ScalingLaw(amplitude, alpha, floor)
    flops = np.geomspace(1e18, 3e20, 12)
    fitted = fit_scaling_law(flops, [law.loss(c) for c in flops])
    assert fitted.alpha == pytest.approx(alpha, rel=1e-5) and fitted.floor == pytest.approx(floor, abs=1e-6)
    assert fitted.amplitude == pytest.approx(amplitude, rel=1e-3) and fitted.residual < 1e-9


def test_stated_errors_cover_the_truth_as_often_as_they_should():
    law, flops = ScalingLaw(2.73e8, 0.45, 3.06), np.geomspace(2e18, 3e20, 25)
    generator, inside, trials = np.random.default_rng(0), {"floor": 0, "loss": 0}, 200
    for _ in range(trials):
        losses = np.array([law.loss(c) for c in flops]) + generator.normal(0, 0.003, len(flops))
        fitted = fit_scaling_law(flops, losses)
        inside["floor"] += abs(fitted.floor - law.floor) < fitted.errors[2]
        inside["loss"] += abs(fitted.loss(3e21) - law.loss(3e21)) < fitted.loss_error(3e21)
    for name, count in inside.items():
        assert 0.58 < count / trials < 0.78, name  # a standard error covers 68%


def test_errors_grow_beyond_the_data():
    law, flops = ScalingLaw(2.73e8, 0.45, 3.06), np.geomspace(2e18, 3e20, 25)
    losses = np.array([law.loss(c) for c in flops]) + np.random.default_rng(1).normal(0, 0.003, len(flops))
    fitted = fit_scaling_law(flops, losses)
    assert fitted.loss_error(3e19) < fitted.loss_error(3e21) < fitted.loss_error(3e22)
    assert law.loss_error(1e20) is None


@pytest.mark.parametrize(
    ("flops", "losses", "message"),
    [
        ([1e18, 2e18, 3e18], [3, 2.9, 2.8], "3 different FLOPs"),
        ([1e18, 1e18, 1e18, 1e18, 1e18], [3, 3, 3, 3, 3], "1 different FLOPs"),
        ([1e18, 2e18, 4e18, 8e18], [3, float("nan"), 2, 1], "finite losses"),
        ([0, 2e18, 4e18, 8e18], [3, 2.5, 2, 1], "positive FLOPs"),
        ([1e18, 2e18, 4e18, 8e18, 1e19], [2.0, 2.5, 2.8, 2.9, 3.0], "do not fall"),
    ],
)
def test_what_determines_no_law(flops, losses, message):
    with pytest.raises(DataError, match=message):
        fit_scaling_law(flops, losses)
