"""The console line names every figure that a row has, and none that it has not."""

from megatron_kd.metrics.tracker import console_line

ROW = {
    "step": 3,
    "loss": 3.25,
    "lm_loss": 3.5,
    "kd_loss": 3.0,
    "grad_norm": 1.234,
    "learning_rate": 3e-4,
    "tokens_per_second": 123456.0,
    "tflops_per_second": 412.3,
    "mfu": 0.417,
    "memory_bytes": 3 * 2**30,
}


def test_all_figures():
    assert console_line(ROW) == (
        "loss 3.2500, lm 3.5000 kd 3.0000, grad 1.23, lr 3.00e-04, 123,456 tokens/s, 412 TFLOP/s, MFU 41.7%, 3.0 GiB"
    )


def test_plain_pre_training_on_an_unknown_device():
    row = {name: value for name, value in ROW.items() if name not in ("mfu", "kd_loss")}
    line = console_line({**row, "kd_loss": 0.0})
    assert "kd" not in line and "MFU" not in line and "loss 3.2500" in line
