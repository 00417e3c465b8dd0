"""Cost of recording a step: seconds to read the memory and write one row, compared with a step at 10 steps per second.

Measured with metrics.jsonl and the console line alone, and with TensorBoard as well.

    python benchmarks/bench_metrics.py [--quick] [--output FILE.json]
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.provenance import provenance  # noqa: E402
from megatron_kd.metrics.device import MemoryMeter  # noqa: E402
from megatron_kd.metrics.sinks import MetricsConfig, SinkName  # noqa: E402
from megatron_kd.metrics.tracker import RunTracker  # noqa: E402

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
    "mfu": 0.41,
    "train_flops": 1e18,
    "seconds": 100.0,
    "tokens": 1_000_000,
}


def measure(report_to: tuple[SinkName, ...], rows: int) -> list[float]:
    """Return the seconds that each row took, sorted."""
    with tempfile.TemporaryDirectory() as folder:
        tracker = RunTracker(Path(folder), rows, 0, True, "bench", MetricsConfig(report_to=report_to))
        meter, times = MemoryMeter(torch.device("cuda" if torch.cuda.is_available() else "cpu")), []
        for step in range(1, rows + 1):
            started = time.perf_counter()
            tracker.step({"step": step, **ROW, "memory_bytes": meter.read()})
            times.append(time.perf_counter() - started)
        tracker.close()
    return sorted(times)


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = 300 if options.quick else 5000
    trackers: dict[str, tuple[SinkName, ...]] = {"metrics.jsonl and console": (), "and TensorBoard": ("tensorboard",)}
    results = {}
    for name, report_to in trackers.items():
        times = measure(report_to, rows)
        results[name] = {
            "median_seconds": times[len(times) // 2],
            "p95_seconds": times[int(len(times) * 0.95)],
            "mean_share_of_a_step": sum(times) / len(times) / STEP_SECONDS,
        }
        sys.stdout.write(
            f"{name:<28} median {results[name]['median_seconds'] * 1e6:8.1f} us, p95 "
            f"{results[name]['p95_seconds'] * 1e6:8.1f} us, {results[name]['mean_share_of_a_step']:.3%} "
            "of a step at 10 steps/s\n"
        )
    if options.output:
        options.output.write_text(json.dumps({"provenance": provenance(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
