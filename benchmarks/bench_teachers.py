"""What a teacher adds to a step, by placement, against what its parts cost alone in the same run.

    python -m benchmarks.bench_teachers [--quick] [--rounds N] [--only PART,…] [--output FILE]

One thread per process. Student and teacher are ``qwen_21m`` (V = 32,000) on random ids.

    local                   one rank: student-only step, teacher forward with its head alone, co-located step, step with
                            a cache
    pipeline                the same on two ranks, student and teacher pipeline parallel
    hidden, top_k, sampled  one student rank and one teacher rank on processors of their own (the machine needs two):
                            student-only step and the teacher-head product while the teacher idles, then steps with
                            that payload

Every round measures every side; ratios are taken within a round, then their median.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import numpy
import torch

from benchmarks.provenance import provenance

MODEL, VOCABULARY, SEQ_LENGTH, ROWS, MICRO_BATCHES = "qwen_21m", 32_000, 128, 4, 2


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--output", type=Path, help="JSON file for the results; parts not measured now stay in it")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        prepare = Path(folder)
        in_processes(1, make_inputs, prepare)
        for name in options.only.split(","):
            world, function, argument = PARTS[name]
            origin = provenance()
            rows = in_processes(world, function, prepare, argument, rounds)[0]
            for row in rows:
                sys.stdout.write(describe(row))
                sys.stdout.flush()
            if options.output is not None:
                record(options.output, name, {"provenance": origin, "rounds": rounds, "rows": rows})


def record(path: Path, name: str, part: dict[str, Any]) -> None:
    """Put a part into a record, beside or instead of those that it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["results"] if path.exists() else {}
    content = {"benchmark": "teachers", "model": MODEL, "tokens_a_step": SEQ_LENGTH * ROWS * MICRO_BATCHES,
               "results": {**before, name: part}}  # fmt: skip
    path.write_text(json.dumps(content, indent=2) + "\n")


def describe(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    parts = " + ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in row["alone"].items())
    waits = f", waits {100 * row['waited']:.1f}% of it" if "waited" in row else ""
    return (
        f"{row['side']:<16} {1000 * row['seconds']:>7.0f} ms per step: {row['ratio']['median']:.2f} x ({parts} ms)"
        f"{waits}   [{row['ratio']['min']:.2f} to {row['ratio']['max']:.2f}]\n"
    )


def in_processes(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call ``function(*arguments)`` in fresh processes with torchrun's variables; return the results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with context.Pool(world) as pool:  # one task per process: each waits for the others
        waiting = [pool.apply_async(_call, (rank, world, port, function, arguments)) for rank in range(world)]
        return [result.get() for result in waiting]


def _call(rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple) -> Any:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    from megatron_kd.logs import silence_known_noise

    silence_known_noise()
    return function(*arguments)


def settings(folder: Path, pipeline: int = 1, **teacher: Any) -> Any:
    """Return the configuration of a run with or without a teacher."""
    from megatron_kd.config import from_mapping
    from megatron_kd.training.train_config import TrainConfig

    method = {"distillation": {"method": "vanilla_kd"}, "teacher": teacher} if teacher else {}
    return from_mapping(TrainConfig, {
        "data": {"path": str(folder / "data")}, "output": str(folder / "teacher"), "model": {"name": MODEL},
        "training": {"global_batch_size": ROWS * MICRO_BATCHES, "micro_batch_size": ROWS, "train_iters": 1_000_000},
        "parallel": {"pipeline_model_parallel_size": pipeline}, **method,
    }, "benchmark")  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Write a dataset of random ids, a teacher after one step, and its cache."""
    import dataclasses

    from megatron_kd.config import from_mapping
    from megatron_kd.teachers import cache_teacher_logits as cache
    from megatron_kd.training.train import run
    from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

    ids = numpy.random.default_rng(0).integers(1, VOCABULARY, size=(256, SEQ_LENGTH + 1))
    write_chunk_dataset(folder / "data", ids, plain_tokenizer_info(VOCABULARY, 0), SEQ_LENGTH)
    config = settings(folder)
    run(dataclasses.replace(config, training=dataclasses.replace(config.training, train_iters=1)))
    cache.run(from_mapping(cache.CacheTeacherLogitsConfig, {
        "data": {"path": str(folder / "data")}, "teacher": {"path": str(folder / "teacher")},
        "output": str(folder / "cache"), "codec": "sampled",
    }, "benchmark"))  # fmt: skip


class Parts:
    """Student, optimizer and batches on this rank; steps with and without a teacher."""

    def __init__(self, config: Any, runtime: Any):
        from megatron_kd.parallel.groups import create_process_groups
        from megatron_kd.training.optimizer import build_optimizer
        from megatron_kd.training.training_run import ScheduledData, build_student, open_run

        self.config, self.run = config, open_run(config, runtime)
        self.groups = create_process_groups(self.run.layout)
        self.model = build_student(self.run, self.groups)
        self.optimizer = build_optimizer(config.optimizer, self.model, self.groups, bf16=False)
        self.schedule = ScheduledData(self.run)

    def teacher(self, config: Any) -> Any:
        """Build the teacher that a configuration asks for."""
        from megatron_kd.training.training_run import build_teacher

        return build_teacher(dataclasses.replace(self.run, config=config), self.groups)

    def step(self, config: Any, teacher: Any) -> Callable[[int], float]:
        """Return a function: position of a global batch -> seconds of a step on it."""
        from megatron_kd.training.methods.method_builders import MethodParts, build_losses
        from megatron_kd.training.objective import FusedLoss, MicroBatchLoss
        from megatron_kd.training.train_step import TrainStep

        run = dataclasses.replace(self.run, config=config)
        losses = build_losses(MethodParts(run, self.groups, self.model, teacher, FusedLoss(self.groups)))

        step = TrainStep(
            model=self.model, optimizer=self.optimizer, groups=self.groups, teacher=teacher, clip_grad=1.0,
            micro_batch_loss=MicroBatchLoss(losses, teacher),
        )  # fmt: skip

        def timed(position: int) -> float:
            batches = self.batches(position)
            return seconds(lambda: step(batches, 1e-5))

        return timed

    def batches(self, position: int) -> list[Any]:
        """Return the micro-batches at a position."""
        return [self.schedule.read(position, 0, m) for m in range(MICRO_BATCHES)]


def seconds(action: Callable[[], Any]) -> float:
    """Return the wall time of a call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


@torch.no_grad()
def head_product(head: Any, tokens: int) -> None:
    """Apply the teacher's output layer to some tokens, in tiles as the loss does."""
    hidden = torch.ones(tokens, head.weight.shape[1])
    for part in hidden.split(1024):
        part @ head.weight.t()


def local(folder: Path, pipeline: int, rounds: int) -> list[dict[str, Any]]:
    """Measure co-located and cached teachers, on as many ranks as stages."""
    from megatron_kd.parallel.runtime import distributed_runtime

    colocated = settings(folder, pipeline, placement="colocated", path=str(folder / "teacher"))
    cached = settings(folder, pipeline, placement="cached", cache_path=str(folder / "cache"))
    with distributed_runtime() as runtime:
        parts = Parts(settings(folder, pipeline), runtime)
        teacher = parts.teacher(colocated)
        sides = {
            "student": parts.step(parts.config, None),
            "colocated": parts.step(colocated, teacher),
            "cached": parts.step(cached, parts.teacher(cached)),
        }

        def forward(position: int) -> float:
            batches = parts.batches(position)

            def passes() -> None:
                teacher.begin_step(batches)
                for batch in batches:
                    known = teacher.knowledge(batch)
                    if known is not None:
                        head_product(known.head, known.hidden.shape[0])
                torch.distributed.barrier()

            return seconds(passes)

        sides["teacher"] = forward
        times = measure(sides, rounds)
    return [
        row(f"colocated PP{pipeline}", times, "colocated", ["student", "teacher"]),
        row(f"cached PP{pipeline}", times, "cached", ["student"]),
    ]


def remote(folder: Path, payload: str, rounds: int) -> list[dict[str, Any]]:
    """Measure a remote payload; the student's rank returns the figures, the teacher's none."""
    from megatron_kd.parallel.runtime import distributed_runtime
    from megatron_kd.teachers.interface import Action, Decision
    from megatron_kd.training.train import serve_student
    from megatron_kd.training.training_run import open_run

    config = settings(folder, placement="remote", path=str(folder / "teacher"), num_ranks=1, payload=payload,
                      prefetch_depth=4)  # fmt: skip
    with distributed_runtime(teacher_ranks=1) as runtime:
        if runtime.is_teacher:
            serve_student(open_run(config, runtime))
            return []
        parts = Parts(config, runtime)
        teacher = parts.teacher(config)
        distil, plain = parts.step(config, teacher), parts.step(settings(folder), None)
        steps, waited, times = 5, [], {"student": [], "head": [], "remote": []}
        position = 0
        head, tokens = parts.model[0].module.output_head(), SEQ_LENGTH * ROWS * MICRO_BATCHES
        for _ in range(rounds + 1):
            times["student"].append(statistics.mean(plain(i) for i in range(steps)))
            times["head"].append(statistics.mean(seconds(lambda: head_product(head, tokens)) for _ in range(steps)))
            distil(position)  # the first of a round finds the teacher cold
            before, started = teacher.waited_seconds, time.perf_counter()
            times["remote"].append(statistics.mean(distil(position + 1 + i) for i in range(steps)))
            waited.append((teacher.waited_seconds - before) / (time.perf_counter() - started))
            position += 1 + steps
            teacher.follow(Decision(Action.CONTINUE, position, position))
            time.sleep(1.0)  # the teacher comes to rest at its prefetch depth
        teacher.follow(Decision(Action.STOP, position, position))
    times = {name: values[1:] for name, values in times.items()}
    alone = ["student", "head"] if payload == "hidden" else ["student"]
    return [{**row(f"remote {payload}", times, "remote", alone), "waited": statistics.median(waited[1:])}]


def measure(sides: dict[str, Callable[[int], float]], rounds: int, steps: int = 5) -> dict[str, list[float]]:
    """Return mean seconds of every side in every round, the sides in turn, after a round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in sides if number % 2 == 0 else reversed(sides):
            taken = statistics.mean(sides[name](number * steps + i) for i in range(steps))
            if number:
                times[name].append(taken)
    return times


def row(side: str, times: dict[str, list[float]], with_teacher: str, alone: list[str]) -> dict[str, Any]:
    """Compare a placement's step with the sum of its parts alone."""
    ratios = [whole / sum(parts) for whole, *parts in zip(times[with_teacher], *(times[name] for name in alone))]
    return {
        "side": side,
        "seconds": statistics.median(times[with_teacher]),
        "alone": {name: statistics.median(times[name]) for name in alone},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


PARTS: dict[str, tuple[int, Callable[..., Any], Any]] = {
    "local": (1, local, 1),
    "pipeline": (2, local, 2),
    "hidden": (2, remote, "hidden"),
    "top_k": (2, remote, "top_k"),
    "sampled": (2, remote, "sampled"),
}

if __name__ == "__main__":
    main()
