"""Training speed on a CPU against Hugging Face's Qwen2ForCausalLM with torch's AdamW, alternating in one run.

    python benchmarks/bench_training.py [--quick] [--output benchmarks/results/training.json]

Each side is a process of its own, as its users run it (ours adapts Megatron-Core and the allocator to the CPU), and
only one works at a time. All do the same: forward, loss, backward, clipping to norm 1, AdamW. Sides: ours; Hugging Face
with ``torch.optim.AdamW`` as its constructor makes it; the same with ``fused=True``. bf16 rows: ours with fp32 master
weights, Hugging Face under autocast. A ratio is the median over rounds of (our tokens/s) / (theirs) in that round.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.provenance import provenance  # noqa: E402
from megatron_kd.logs import silence_known_noise  # noqa: E402
from megatron_kd.models.architecture import ModelArchitecture, architecture_by_name  # noqa: E402

SIDES = ("ours", "hf", "hf_fused")


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    name: str
    model: str
    vocab_size: int
    seq_length: int
    rows: int
    precision: str
    steps: int
    """Of each side in a round: a few seconds of training at a stretch."""

    @property
    def architecture(self) -> ModelArchitecture:
        """Of both sides' models."""
        return architecture_by_name(self.model).with_vocab_size(self.vocab_size)


CASES = (
    Case("quickstart student, fp32", "qwen_toy_student", 512, 256, 8, "fp32", 20),
    Case("21M, fp32", "qwen_21m", 32_000, 512, 4, "fp32", 3),
    Case("quickstart student, bf16", "qwen_toy_student", 512, 256, 8, "bf16", 20),
    Case("21M, bf16", "qwen_21m", 32_000, 512, 4, "bf16", 3),
)


def main() -> None:
    """Run the cases and print and record their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    record: dict[str, Any] = {"benchmark": "training", "provenance": provenance(), "rounds": rounds}
    record["results"] = results = []
    for case in CASES:
        if case.precision == "bf16" and not has_bf16_instructions():
            results.append({"case": case.name, "note": "not measured: no bf16 instructions here"})
            continue
        results.append(measure(case, rounds))
        sys.stdout.write(describe(results[-1]))
        sys.stdout.flush()
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """All sides, alternating; each has warmed up before."""
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Side(name, case)) for name in SIDES}
        first_losses = {name: side.run(1)["loss"] for name, side in sides.items()}
        for side in sides.values():
            side.run(2)
        rates: dict[str, list[float]] = {name: [] for name in SIDES}
        for number in range(rounds):
            for name in SIDES if number % 2 == 0 else reversed(SIDES):
                seconds = sides[name].run(case.steps)["seconds"]
                rates[name].append(case.rows * case.seq_length * case.steps / seconds)
    ratios = {name: [a / b for a, b in zip(rates["ours"], rates[name], strict=True)] for name in SIDES[1:]}
    return {
        "case": case.name, "parameters": case.architecture.parameters, "vocab_size": case.vocab_size,
        "seq_length": case.seq_length, "rows": case.rows, "steps_a_round": case.steps,
        "threads": torch.get_num_threads(),
        "first_losses": first_losses,
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": {name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
                  for name, values in ratios.items()},
    }  # fmt: skip


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    default, fused = row["ratio"]["hf"], row["ratio"]["hf_fused"]
    return (
        f"{row['case']:<26} ours {row['tokens_per_second']['ours']:>8,.0f} tokens/s   Hugging Face "
        f"{row['tokens_per_second']['hf']:>8,.0f}: {default['median']:.2f} x ({default['min']:.2f} to "
        f"{default['max']:.2f})   with fused AdamW {row['tokens_per_second']['hf_fused']:>8,.0f}: "
        f"{fused['median']:.2f} x\n"
    )


class Side:
    """A process that holds one model and optimizer and takes steps when told."""

    def __init__(self, name: str, case: Case):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, case, theirs))

    def __enter__(self) -> "Side":
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(0)
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()

    def run(self, steps: int) -> dict[str, float]:
        """Take ``steps``; their wall time and the last loss."""
        self._pipe.send(steps)
        return self._pipe.recv()


def serve(name: str, case: Case, pipe: Connection) -> None:
    """The body of a side's process."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        step = our_step(case, Path(folder), stack) if name == "ours" else hugging_face_step(case, name == "hf_fused")
        while steps := pipe.recv():
            started = time.perf_counter()
            for _ in range(steps):
                loss = step()
            pipe.send({"seconds": time.perf_counter() - started, "loss": loss})


def random_ids(case: Case) -> numpy.ndarray:
    """[rows, seq_length + 1] ids, the same for every side; 0 (end of a document) does not occur."""
    return numpy.random.default_rng(0).integers(1, case.vocab_size, size=(case.rows, case.seq_length + 1))


def our_step(case: Case, folder: Path, stack: ExitStack) -> Callable[[], float]:
    """One optimizer step of ours, as ``train`` does it."""
    silence_known_noise()
    from megatron_kd.config import from_mapping
    from megatron_kd.data.batch import make_batch
    from megatron_kd.parallel.groups import create_process_groups
    from megatron_kd.parallel.runtime import distributed_runtime
    from megatron_kd.training.methods.method_builders import MethodParts, build_losses
    from megatron_kd.training.objective import FusedLoss, MicroBatchLoss
    from megatron_kd.training.optimizer import build_optimizer
    from megatron_kd.training.train_config import TrainConfig
    from megatron_kd.training.train_step import TrainStep
    from megatron_kd.training.training_run import build_student, open_run
    from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

    dataset = write_chunk_dataset(
        folder / "data", random_ids(case), plain_tokenizer_info(case.vocab_size, 0), case.seq_length
    )
    batch = make_batch(dataset, numpy.arange(case.rows), case.seq_length)
    config = from_mapping(TrainConfig, {
        "data": {"path": str(dataset.path)}, "output": "unused", "model": {"name": case.model},
        "training": {"global_batch_size": case.rows, "micro_batch_size": case.rows, "precision": case.precision},
    }, "benchmark")  # fmt: skip
    runtime = stack.enter_context(distributed_runtime())
    run = open_run(config, runtime)
    groups = create_process_groups(run.layout)
    model = build_student(run, groups)
    losses = build_losses(MethodParts(run, groups, model, None, FusedLoss(groups)))
    step = TrainStep(
        model=model, optimizer=build_optimizer(config.optimizer, model, groups, bf16=case.precision == "bf16"),
        groups=groups, teacher=None, clip_grad=1.0,
        micro_batch_loss=MicroBatchLoss(losses, None),
    )  # fmt: skip
    return lambda: step([batch], 1e-4).loss


def hugging_face_step(case: Case, fused_adam: bool) -> Callable[[], float]:
    """One optimizer step of transformers' model with torch's AdamW."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = case.architecture
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=case.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups, max_position_embeddings=case.seq_length,
        tie_word_embeddings=shape.tie_word_embeddings, rope_theta=shape.rope_theta, use_cache=False,
        initializer_range=shape.init_std,
    )).train()  # fmt: skip
    options = {"fused": True} if fused_adam else {}
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, **options)
    ids = torch.from_numpy(random_ids(case))
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
            loss = model(input_ids=tokens, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return loss.item()

    return step


def has_bf16_instructions() -> bool:
    """Whether the processor multiplies bf16 matrices by itself."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


if __name__ == "__main__":
    main()
