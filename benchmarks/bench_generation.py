"""Generation with a cache of keys and values against transformers' ``generate``: same weights, same prompts, greedy.

    python benchmarks/bench_generation.py [--quick] [--output benchmarks/results/generation.json]

Both sides run in this process in turn, several rounds; a ratio is the median over rounds of (our tokens/s) / (theirs)
in that round. Before it is timed, both must give the same ids.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.provenance import provenance  # noqa: E402
from megatron_kd.logs import silence_known_noise  # noqa: E402
from megatron_kd.models.architecture import architecture_by_name  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One row: a model, prompts of ``prompt`` ids in a batch of ``rows``, ``response`` ids more."""

    model: str
    vocab_size: int
    rows: int
    prompt: int
    response: int


CASES = (
    Case("qwen_toy_student", 512, 8, 192, 64),
    Case("qwen_toy_student", 512, 64, 192, 64),
    Case("qwen_21m", 32_000, 8, 192, 64),
)


def main() -> None:
    """Run the cases and print and record their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    silence_known_noise()
    results = []
    for case in CASES:
        results.append(measure(case, 2 if options.quick else options.rounds))
        sys.stdout.write(describe(results[-1]))
        sys.stdout.flush()
    if options.output is not None:
        record = {"benchmark": "generation", "provenance": provenance(), "results": results}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Both sides, alternating, after each has run once."""
    from megatron_kd.parallel.runtime import distributed_runtime

    prompts = np.random.default_rng(0).integers(1, case.vocab_size, size=(case.rows, case.prompt))
    with distributed_runtime(), torch.no_grad():
        ours, theirs = build_sides(case, prompts)
        same = float((ours() == theirs()).float().mean())
        rates: dict[str, list[float]] = {"ours": [], "transformers": []}
        for number in range(rounds):
            sides = [("ours", ours), ("transformers", theirs)]
            for name, side in sides if number % 2 == 0 else reversed(sides):
                started = time.perf_counter()
                side()
                rates[name].append(case.rows * case.response / (time.perf_counter() - started))
    ratios = [a / b for a, b in zip(rates["ours"], rates["transformers"], strict=True)]
    return {
        "model": case.model, "rows": case.rows, "prompt": case.prompt, "response": case.response,
        "threads": torch.get_num_threads(), "same_ids": same,
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }  # fmt: skip


def build_sides(case: Case, prompts: np.ndarray) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """Two functions that give [rows, prompt + response] ids, over the same weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from megatron_kd.checkpoints.hf_folder import HFFolder
    from megatron_kd.generation.decoder import Decoder
    from megatron_kd.generation.generate import ModelPolicy, generate
    from megatron_kd.generation.generation_config import SamplingConfig
    from megatron_kd.models.gpt import build_model
    from megatron_kd.parallel.groups import create_process_groups
    from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout

    shape, length = architecture_by_name(case.model).with_vocab_size(case.vocab_size), case.prompt + case.response
    torch.manual_seed(0)
    reference = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=case.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups, max_position_embeddings=length, rope_theta=shape.rope_theta,
        tie_word_embeddings=shape.tie_word_embeddings, initializer_range=shape.init_std,
    )).eval()  # fmt: skip
    layout = ParallelLayout.for_world(ParallelConfig(), 1)
    groups = create_process_groups(layout)
    chunks = build_model(
        shape, layout, groups, precision="fp32", device=torch.device("cpu"), max_sequence_length=length
    )
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        HFFolder(Path(folder)).load_into(chunks)

    def ours() -> torch.Tensor:
        decoder = Decoder(chunks, groups, case.rows, length)
        return generate(
            ModelPolicy(decoder), list(prompts), np.arange(case.rows, dtype=np.uint64), max_length=length, eos_id=None,
            pad_id=0, sampling=SamplingConfig(temperature=0.0),
        ).tokens  # fmt: skip

    def theirs() -> torch.Tensor:
        return reference.generate(
            torch.from_numpy(prompts), max_new_tokens=case.response, do_sample=False, eos_token_id=None, pad_token_id=0,
            attention_mask=torch.ones(prompts.shape, dtype=torch.long),
        )  # fmt: skip

    return ours, theirs


def describe(row: dict[str, Any]) -> str:
    """A line of the table."""
    rates, ratio = row["tokens_per_second"], row["ratio"]
    return (
        f"{row['model']:<18} batch {row['rows']:>3}  ours {rates['ours']:>8,.0f} tokens/s   transformers "
        f"{rates['transformers']:>8,.0f}: {ratio['median']:.2f} x ({ratio['min']:.2f} to {ratio['max']:.2f}), "
        f"{row['same_ids']:.1%} of the ids equal\n"
    )


if __name__ == "__main__":
    main()
