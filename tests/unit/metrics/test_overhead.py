"""What recording a step costs: under 1% of a step at 10 steps a second, with TensorBoard on."""

import time

import pytest

from megatron_kd.metrics.sinks import MetricsConfig
from megatron_kd.metrics.tracker import RunTracker

STEP_SECONDS = 0.1
ROW = {
    "loss": 3.25,
    "lm_loss": 3.5,
    "kd_loss": 3.0,
    "teacher_entropy": 1.0,
    "grad_norm": 1.2,
    "learning_rate": 3e-4,
    "step_seconds": 0.1,
    "tokens_per_second": 1e5,
    "tflops_per_second": 412.3,
    "memory_bytes": 3 * 2**30,
    "train_flops": 1e18,
    "seconds": 100.0,
    "tokens": 1_000_000,
}


@pytest.mark.parametrize("report_to", [(), ("tensorboard",)])
def test_a_row_costs_under_a_hundredth_of_a_step(tmp_path, report_to):
    tracker = RunTracker(tmp_path, 10_000, 0, True, "test", MetricsConfig(report_to=report_to))
    best = float("inf")
    for attempt in range(10):  # the fastest of ten: a loaded machine interrupts some
        started = time.perf_counter()
        for step in range(20):
            tracker.step({"step": 20 * attempt + step + 1, **ROW})
        best = min(best, (time.perf_counter() - started) / 20)
    tracker.close()
    assert best < 0.01 * STEP_SECONDS, f"{best * 1e3:.3f} ms per row"
