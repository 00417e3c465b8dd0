"""Speed and memory of conversion beside a plain copy, and how long a save blocks training.

    python benchmarks/bench_checkpoints.py --output benchmarks/results/checkpoints.json    1.8B parameters in bf16
    python benchmarks/bench_checkpoints.py --quick                                         a small folder

Conversion: seconds and peak memory of ``convert_from_hf`` and ``convert_to_hf`` (verify=false), each in a process of
its own, beside copying the same folder file by file with a flush to the disk. Memory is what the process holds beyond a
process that only imports the verb; pages of files that the kernel may drop are not counted (RssAnon).

Save: the seconds for which ``begin`` blocks the loop with a background thread, beside a save that is waited for, of a
model with its Adam moments.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.provenance import REPOSITORY, provenance  # noqa: E402
from megatron_kd.logs import silence_known_noise  # noqa: E402

RUN_VERB = "import sys; from megatron_kd.cli import main; main(sys.argv[1], sys.argv[2:])"
IMPORT_ONLY = "import sys; import megatron_kd.conversion.convert_from_hf, megatron_kd.conversion.convert_to_hf"


def generate_folder(folder: Path, scale: float) -> dict[str, int]:
    """Write a Qwen2-like folder of ``scale`` x 1.8B parameters in bf16; return its size and its largest tensor's."""
    import torch

    from megatron_kd.checkpoints.families import hf_config, tensor_table
    from megatron_kd.checkpoints.safetensors_file import SafetensorsWriter, TensorSpec
    from megatron_kd.checkpoints.sharded_state import meta_state, meta_tensors
    from megatron_kd.data.tokenization import train_byte_level_bpe
    from megatron_kd.models.architecture import architecture_by_name
    from megatron_kd.parallel.runtime import distributed_runtime

    architecture = architecture_by_name("qwen_1.8b")
    architecture = dataclasses.replace(
        architecture,
        num_layers=max(1, round(architecture.num_layers * scale)),
        vocab_size=max(512, round(architecture.vocab_size * scale)),
    )
    train_byte_level_bpe([f"{i} {i * i} some words {chr(97 + i % 26) * 5}" for i in range(2000)], 300, folder)
    with distributed_runtime():
        shapes = meta_tensors(meta_state(architecture, "bf16"))
    table = tensor_table(architecture, str(folder))
    parts = [part for name, tensor in shapes.items() for part in table.to_hf(name, tensor)]
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in parts}
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(folder, specs, 10**9) as writer:
        for name, spec in specs.items():
            writer.add(name, torch.empty(spec.shape, dtype=spec.dtype).uniform_(-0.1, 0.1, generator=generator))
    (folder / "config.json").write_text(json.dumps(hf_config(architecture, "bfloat16", 0)))
    sizes = [spec.nbytes for spec in specs.values()]
    return {"parameters": architecture.parameters, "bytes": sum(sizes), "largest_tensor_bytes": max(sizes)}


def measured(arguments: list[str]) -> dict[str, float]:
    """Run a Python process; return its seconds and largest anonymous memory."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", *arguments], cwd=REPOSITORY, env=environment)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{arguments}: status {process.returncode}")
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak}


def anonymous_bytes(pid: int) -> int:
    """Return RssAnon of a process; 0 if it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def copy_seconds(source: Path, target: Path) -> float:
    """Copy a folder's files one by one, each flushed to the disk; return the seconds."""
    started = time.perf_counter()
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file():
            shutil.copyfile(file, target / file.name)
            with open(target / file.name, "rb") as written:
                os.fsync(written.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def bench_conversion(work: Path, scale: float, rounds: int) -> dict[str, Any]:
    """Measure both conversions and the copy, in turn."""
    facts = generate_folder(work / "hf", scale)
    sides: dict[str, list[dict[str, float]]] = {"convert_from_hf": [], "convert_to_hf": []}
    copies, starts = [], []
    for _ in range(rounds):
        starts.append(measured([IMPORT_ONLY]))
        copies.append(copy_seconds(work / "hf", work / "copy"))
        for verb, source, target in (("convert_from_hf", "hf", "checkpoint"), ("convert_to_hf", "checkpoint", "back")):
            shutil.rmtree(work / target, ignore_errors=True)
            keys = [f"input={work / source}", f"output={work / target}", "verify=false"]
            sides[verb].append(measured([RUN_VERB, verb, *keys]))
    start_seconds = median(run["seconds"] for run in starts)
    start_bytes = median(run["peak_bytes"] for run in starts)
    report: dict[str, Any] = {**facts, "copy_seconds": median(copies), "start_seconds": start_seconds}
    for verb, runs in sides.items():
        seconds = median(run["seconds"] for run in runs)
        held = max(run["peak_bytes"] for run in runs) - start_bytes
        report[verb] = {
            "seconds": seconds,
            "seconds_without_start": seconds - start_seconds,
            "speed_of_a_copy": report["copy_seconds"] / max(1e-9, seconds - start_seconds),
            "largest_tensors_in_memory": held / facts["largest_tensor_bytes"],
        }
    return report


def bench_save(work: Path, rounds: int, model: str) -> dict[str, Any]:
    """Measure the seconds for which a save blocks the loop, in the background and waited for."""
    from megatron_kd.checkpoints.checkpoint_writer import CheckpointWriter, Retention
    from megatron_kd.parallel.runtime import distributed_runtime
    from megatron_kd.training.checkpoint import Progress, description, training_state
    from tests.distributed.training.runs import make_dataset
    from tests.reference import one_rank

    dataset = make_dataset(work / "data", chunks=8)
    settings = one_rank.train_config(dataset, model={"name": model})
    with distributed_runtime() as runtime:
        parts = one_rank.TrainingParts(dataset, runtime, config=settings)
        writer = CheckpointWriter(work / "checkpoints", Retention(1))
        held: dict[bool, list[float]] = {True: [], False: []}
        for step in range(1, 2 * rounds + 3):
            in_background = step % 2 == 1
            started = time.perf_counter()
            state = training_state(parts.model, parts.optimizer, parts.groups, is_loading=False)
            about = description(Progress(step=step), parts.architecture, {"precision": "fp32", "seq_length": 32})
            writer.begin(step, state, about, in_background=in_background)
            if not in_background:
                writer.finish()
            seconds = time.perf_counter() - started
            if in_background:
                wait_for_thread(writer)
                started = time.perf_counter()
                writer.finish()
                seconds += time.perf_counter() - started
            if step > 2:  # the first of each kind pays for imports and for memory
                held[in_background].append(seconds)
        size = sum(file.stat().st_size for file in (work / "checkpoints").rglob("*") if file.is_file())
    background, waited = median(held[True]), median(held[False])
    return {
        "model": model,
        "checkpoint_bytes": size,
        "background_seconds": background,
        "waited_seconds": waited,
        "share": background / waited,
    }


def wait_for_thread(writer: Any) -> None:
    """Wait as training does, without blocking the thread."""
    while writer.is_writing:
        threading.Event().wait(0.005)


def main() -> None:
    """Run, print, record."""
    silence_known_noise()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0, help="of 1.8B parameters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="record the report here")
    parser.add_argument("--folder", type=Path, help="where to work; needs five times the folder's 3.7 GB")
    options = parser.parse_args()
    scale, rounds = (0.02, 1) if options.quick else (options.scale, options.rounds)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        conversion = bench_conversion(Path(name), scale, rounds)
        save = bench_save(Path(name), rounds, "qwen_toy_student" if options.quick else "qwen_200m")
    report = {"provenance": provenance(), "conversion": conversion, "save": save}
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
