"""Time and memory of the fused distillation loss, beside bare matrix products and other public losses.

    python benchmarks/bench_losses.py --quick          # seconds, small shapes
    python benchmarks/bench_losses.py                  # the shapes of docs/losses.md, minutes

Every row is one whole training call: student and teacher logits from hidden states, forward KL, gradients of the
student's hidden states and output weight; ours computes the LM loss as well. The floor is the four matrix products
alone (two of logits, two of gradients), whole or in tiles, whichever is faster, with buffers made beforehand; ours
keeps its own in a ``Workspace``, as training does. Rows are run in turn, repeatedly; times are medians. Memory is the
peak of torch's allocations during one more call that makes its buffers anew, without inputs, the two gradients and
``main_grad``, but with the dummy that Megatron-Core's hooks are given; memory that libraries allocate themselves is not
seen. Peers are used as installed from PyPI; the rows of absent ones, and CUDA rows on a machine without a GPU, say 'not
measured'. Install them beside the project with ``pip install --no-deps nvidia-modelopt torchtune`` and, for CUDA,
``liger-kernel``. Under 'holds': whether our rows are within the limits that the project sets itself (the full shapes
only).
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.loss_calls import (  # noqa: E402
    Call,
    Inputs,
    Shape,
    bare_products,
    fused,
    liger,
    modelopt,
    plain_torch,
    torchtune,
)
from benchmarks.provenance import provenance  # noqa: E402
from megatron_kd.losses import DEFAULT_TILE_BYTES, DIVERGENCES, Workspace  # noqa: E402
from tests.reference.peak_memory import measure  # noqa: E402

FLOOR_TILES = (256,)
RESULTS = Path(__file__).resolve().parent / "results"
NOT_MEASURED = "not measured"
MIB = 1 << 20

CPU_SHAPE = Shape(1024, 1024, 2048, 151_936)
CPU_MEMORY_SHAPES = [Shape(n, 1024, 2048, 151_936) for n in (512, 1024, 4096)] + [Shape(1024, 1024, 2048, 32_000)]
TIMES_FLOOR_LIMIT = {"cpu": 1.05, "cuda": 1.25}
CUDA_MEMORY_LIMIT_MIB = 1024
QUICK_SHAPE = Shape(256, 128, 256, 8_192)
QUICK_MEMORY_SHAPES = [Shape(n, 128, 256, 8_192) for n in (128, 256, 1024)] + [Shape(256, 128, 256, 2_048)]
CUDA_SHAPE = Shape(8192, 4096, 4096, 128_256, torch.bfloat16)


def median_times(calls: dict[str, Call | None], inputs: Inputs, repeats: int) -> dict[str, list[float] | None]:
    """Run every call in turn, repeatedly, and return the seconds of each run."""
    times: dict[str, list[float] | None] = {name: None if call is None else [] for name, call in calls.items()}
    present = [call for call in calls.values() if call is not None]
    progress = tqdm(total=(repeats + 1) * len(present), desc="runs", disable=not sys.stderr.isatty())
    for turn in range(repeats + 1):
        for name, call in calls.items():
            if call is None:
                continue
            progress.update()
            inputs.clear()
            gc.collect()
            _wait(inputs)
            start = time.perf_counter()
            call()
            _wait(inputs)
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    progress.close()
    return times


def memory_beyond_gradients(call: Call, inputs: Inputs) -> float:
    """Return the MiB at the peak of one call, without the gradients that it leaves."""
    inputs.clear()
    if inputs.hidden.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = measure(call).peak
    gradients = inputs.gradient_bytes
    inputs.clear()
    return (peak - gradients) / MIB


def time_table(shape: Shape, repeats: int, device: str, all_divergences: bool) -> list[dict[str, Any]]:
    """Measure time and memory of all losses at one shape: one row for each."""
    inputs = Inputs(shape, device)
    calls: dict[str, Call | None] = {
        f"four bare products, {tile} tokens per tile": bare_products(inputs, tile)
        for tile in (*(tokens for tokens in FLOOR_TILES if tokens < shape.tokens), shape.tokens)
    }
    floors = list(calls)
    for divergence in DIVERGENCES if all_divergences else ("forward_kl",):
        calls[f"ours, LM + {divergence}"] = fused(inputs, divergence, Workspace())
        if device == "cuda":
            calls[f"ours, Triton, LM + {divergence}"] = fused(inputs, divergence, backend="triton")
    calls["log_softmax + kl_div, whole logits"] = plain_torch(inputs)
    calls["ModelOpt LogitsKLLoss"] = modelopt(inputs)
    calls["torchtune ForwardKLWithChunkedOutputLoss"] = torchtune(inputs)
    calls["Liger-Kernel LigerFusedLinearJSD"] = liger(inputs)
    times = median_times(calls, inputs, repeats)
    floor = min(statistics.median(times[name]) for name in floors)
    rows = []
    for name, call in calls.items():
        row: dict[str, Any] = {"loss": name, "shape": shape.describe()}
        if call is None:
            row.update(seconds=NOT_MEASURED, times_floor=NOT_MEASURED, memory_mib=NOT_MEASURED)
        else:
            median = statistics.median(times[name])
            row.update(seconds=round(median, 4), times_floor=round(median / floor, 3), runs=len(times[name]))
            row["fastest"], row["slowest"] = round(min(times[name]), 4), round(max(times[name]), 4)
            if name.startswith("ours"):  # with its buffers made in the call that is measured
                backend = "triton" if "Triton" in name else "torch"
                call = fused(inputs, name.rpartition(" + ")[2], backend=backend)
            row["memory_mib"] = None if name in floors else round(memory_beyond_gradients(call, inputs), 1)
            if name.startswith("ours") and shape in (CPU_SHAPE, CUDA_SHAPE):
                limit = DEFAULT_TILE_BYTES["cpu"] / MIB if device == "cpu" else CUDA_MEMORY_LIMIT_MIB
                row["holds"] = row["times_floor"] <= TIMES_FLOOR_LIMIT[device] and row["memory_mib"] <= limit
        rows.append(row)
    return rows


def memory_table(shapes: list[Shape], device: str) -> list[dict[str, Any]]:
    """Measure our memory at several token counts and vocabularies, beside the budget."""
    rows = []
    for shape in shapes:
        inputs = Inputs(shape, device)
        for divergence in ("forward_kl", "jsd"):
            used = memory_beyond_gradients(fused(inputs, divergence), inputs)
            rows.append({
                "loss": f"ours, LM + {divergence}", "shape": shape.describe(), "memory_mib": round(used, 1),
                "budget_mib": DEFAULT_TILE_BYTES[device] / MIB,
                "two_logit_tensors_mib": round(2 * shape.tokens * shape.vocabulary * shape.dtype.itemsize / MIB, 1),
            })  # fmt: skip
    return rows


def print_table(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Print rows in aligned columns."""
    print(f"\n{title}")
    cells = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def _wait(inputs: Inputs) -> None:
    if inputs.hidden.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, three repeats")
    parser.add_argument("--repeats", type=int, default=None, help="alternations (default 5; 3 with --quick)")
    parser.add_argument("--all-divergences", action="store_true", help="time every divergence, not only forward KL")
    arguments = parser.parse_args()
    repeats = arguments.repeats or (3 if arguments.quick else 5)
    shape = QUICK_SHAPE if arguments.quick else CPU_SHAPE
    shapes = QUICK_MEMORY_SHAPES if arguments.quick else CPU_MEMORY_SHAPES
    rows = time_table(shape, repeats, "cpu", arguments.all_divergences or arguments.quick)
    columns = ("loss", "seconds", "times_floor", "memory_mib", "holds")
    print_table(f"CPU: {shape.describe()}; medians of {repeats}", rows, columns)
    memory = memory_table(shapes, "cpu")
    print_table("CPU: memory beyond inputs and gradients", memory,
                ("loss", "shape", "memory_mib", "budget_mib", "two_logit_tensors_mib"))  # fmt: skip
    if torch.cuda.is_available():
        cuda = time_table(CUDA_SHAPE, repeats, "cuda", arguments.all_divergences)
    else:
        cuda = [
            {
                "loss": name,
                "shape": CUDA_SHAPE.describe(),
                "seconds": NOT_MEASURED,
                "times_floor": NOT_MEASURED,
                "memory_mib": NOT_MEASURED,
            }
            for name in ("ours, LM + forward_kl", "Liger-Kernel LigerFusedLinearJSD")
        ]
    print_table(f"CUDA: {CUDA_SHAPE.describe()}", cuda, columns)
    record = {"benchmark": "losses", "provenance": provenance() | {"threads": torch.get_num_threads()},
              "cpu_time": rows, "cpu_memory": memory, "cuda_time": cuda}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / ("losses_quick.json" if arguments.quick else "losses.json")
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\nwrote benchmarks/results/{path.name}")


if __name__ == "__main__":
    main()
