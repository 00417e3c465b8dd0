"""Training speed on a CPU against Hugging Face's Qwen2ForCausalLM with torch's AdamW, alternating in one process.

    python benchmarks/bench_training.py [--quick] [--output benchmarks/results/training.json]

Rows: the quickstart's student and a 21M-parameter model, fp32 for both; and ours in bf16 with fp32 master weights
beside Hugging Face's in bf16 autocast where the processor multiplies bf16. Both do the same work: forward, loss,
backward, clipping to norm 1, AdamW. The figure is the median over rounds of (our tokens/s) / (theirs) in that round.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy
import torch

from benchmarks.provenance import provenance
from megatron_kd.quiet import silence_known_noise

silence_known_noise()

from megatron_kd.config import from_mapping  # noqa: E402
from megatron_kd.data.batch import Batch, make_batch  # noqa: E402
from megatron_kd.data.chunk_dataset import ChunkDataset, write_chunk_dataset  # noqa: E402
from megatron_kd.data.tokenizer_info import plain_tokenizer_info  # noqa: E402
from megatron_kd.models.architecture import ModelArchitecture, architecture_by_name  # noqa: E402
from megatron_kd.parallel.groups import create_process_groups  # noqa: E402
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout  # noqa: E402
from megatron_kd.parallel.runtime import distributed_runtime  # noqa: E402
from megatron_kd.training.build import build_student, unwrap  # noqa: E402
from megatron_kd.training.config import TrainConfig  # noqa: E402
from megatron_kd.training.objective import MicroBatchLoss, build_objective  # noqa: E402
from megatron_kd.training.optimizer import build_optimizer  # noqa: E402
from megatron_kd.training.train_step import TrainStep  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    name: str
    model: str
    vocab_size: int
    seq_length: int
    rows: int
    precision: str


CASES = (
    Case("quickstart student, fp32", "qwen_toy_student", 4096, 256, 16, "fp32"),
    Case("21M, fp32", "qwen_21m", 32_000, 512, 4, "fp32"),
    Case("quickstart student, bf16", "qwen_toy_student", 4096, 256, 16, "bf16"),
    Case("21M, bf16", "qwen_21m", 32_000, 512, 4, "bf16"),
)


def main() -> None:
    """Run the cases and print and record their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds of 3 steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="steps of each side in a round")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rounds, steps = (2, 3) if options.quick else (options.rounds, options.steps)
    results = []
    for case in CASES:
        if case.precision == "bf16" and not has_bf16_instructions():
            results.append({"case": case.name, "ratio": None, "note": "not measured: no bf16 instructions here"})
            continue
        results.append(measure(case, rounds, steps))
        row = results[-1]
        sys.stdout.write(f"{row['case']:<28} ours {row['ours_tokens_per_second']:>9,.0f} tokens/s   Hugging Face "
                         f"{row['hf_tokens_per_second']:>9,.0f}   ratio {row['ratio']:.2f} "
                         f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f})\n")
        sys.stdout.flush()
    record = {"benchmark": "training", "provenance": provenance(), "rounds": rounds, "steps": steps, "results": results}
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")


def measure(case: Case, rounds: int, steps: int) -> dict:
    """Both sides, alternating; each has warmed up before."""
    with tempfile.TemporaryDirectory() as folder, distributed_runtime() as runtime:
        dataset = random_dataset(Path(folder) / "data", case)
        batch = make_batch(dataset, numpy.arange(case.rows), case.seq_length)
        architecture = architecture_by_name(case.model).with_vocab_size(case.vocab_size)
        ours = our_step(case, architecture, dataset, batch, runtime)
        theirs = hugging_face_step(case, architecture, batch)
        first_losses = (ours(), theirs())
        for step in (ours, theirs):
            step()
        ratios, ours_rates, their_rates = [], [], []
        tokens = batch.tokens.numel() * steps
        for number in range(rounds):
            sides = [(ours, ours_rates), (theirs, their_rates)]
            for step, rates in sides if number % 2 == 0 else reversed(sides):
                started = time.perf_counter()
                for _ in range(steps):
                    step()
                rates.append(tokens / (time.perf_counter() - started))
            ratios.append(ours_rates[-1] / their_rates[-1])
    return {
        "case": case.name, "parameters": architecture.parameters, "vocab_size": case.vocab_size,
        "seq_length": case.seq_length, "rows": case.rows, "threads": torch.get_num_threads(),
        "first_losses": first_losses,
        "ours_tokens_per_second": statistics.median(ours_rates), "hf_tokens_per_second": statistics.median(their_rates),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
    }


def our_step(case: Case, architecture: ModelArchitecture, dataset: ChunkDataset, batch: Batch,
             runtime) -> Callable[[], float]:
    """One optimizer step of ours, as ``train`` does it."""
    config = from_mapping(TrainConfig, {
        "data": {"path": str(dataset.path)}, "output": "unused", "model": {"name": case.model},
        "training": {"global_batch_size": case.rows, "micro_batch_size": case.rows, "precision": case.precision},
    }, "benchmark")
    layout = ParallelLayout.for_world(ParallelConfig(), 1)
    groups = create_process_groups(layout)
    model = build_student(config, architecture, dataset, layout, groups, runtime)
    optimizer = build_optimizer(config.optimizer, model, groups, bf16=case.precision == "bf16")
    step = TrainStep(
        model=model, optimizer=optimizer, groups=groups, teacher=None, reduction="token", clip_grad=1.0,
        micro_batch_loss=MicroBatchLoss(build_objective(config.distillation), None, groups, "token", unwrap),
    )
    return lambda: step([batch], 1e-4).loss


def hugging_face_step(case: Case, architecture: ModelArchitecture, batch: Batch) -> Callable[[], float]:
    """One optimizer step of transformers' model with torch's AdamW (its fused kernel, the faster one)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=case.vocab_size, hidden_size=architecture.hidden_size, intermediate_size=architecture.ffn_hidden_size,
        num_hidden_layers=architecture.num_layers, num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=architecture.num_query_groups, max_position_embeddings=case.seq_length,
        tie_word_embeddings=architecture.tie_word_embeddings, rope_theta=architecture.rope_theta, use_cache=False,
    ))
    model.train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True)
    labels = batch.labels.masked_fill(batch.loss_mask == 0, -100)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
            loss = model(input_ids=batch.tokens, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        return loss.item()

    return step


def random_dataset(folder: Path, case: Case) -> ChunkDataset:
    """``rows`` whole chunks of random ids."""
    generator = numpy.random.default_rng(0)
    chunks = (generator.integers(1, case.vocab_size, size=case.seq_length + 1) for _ in range(case.rows))
    return write_chunk_dataset(folder, chunks, plain_tokenizer_info(case.vocab_size, 0), case.seq_length)


def has_bf16_instructions() -> bool:
    """Whether the processor multiplies bf16 matrices by itself."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


if __name__ == "__main__":
    main()
