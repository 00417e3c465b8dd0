"""Scoring on a CPU beside Hugging Face's Qwen2ForCausalLM over padded batches of the same chunks.

Each side is a process of its own with the same weights; only one works at a time, in alternating rounds. Theirs is
what a user writes: rows in corpus order, padded to the longest of the batch, logits, ``cross_entropy`` per position,
mean over the mask. Ours is the scorer of ``score_corpus``. Rates count predicted tokens, so padding that is computed
costs. The scores of both sides are compared. Targets: at least 1.4 times the rate at a lower peak memory.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_kd.logs import silence_known_noise  # noqa: E402
from megatron_kd.models.architecture import ModelArchitecture, architecture_by_name  # noqa: E402

LIMIT = 1.4


@dataclass(frozen=True)
class Case:
    """One row: a model, and how long the chunks are."""

    name: str
    model: str
    vocab_size: int
    seq_length: int
    shortest: int
    rows: int
    chunks: int

    @property
    def architecture(self) -> ModelArchitecture:
        """Architecture of both sides' models."""
        return architecture_by_name(self.model).with_vocab_size(self.vocab_size)

    def lengths(self) -> np.ndarray:
        """Ids per chunk."""
        return np.random.default_rng(1).integers(self.shortest, self.seq_length + 2, self.chunks)


CASES = (
    Case("quickstart teacher, sentence ends", "qwen_toy_teacher", 512, 256, 220, 16, 128),
    Case("21M of 32,000 ids, sentence ends", "qwen_21m", 32_000, 512, 470, 8, 32),
    Case("21M of 32,000 ids, one document a chunk", "qwen_21m", 32_000, 512, 2, 8, 64),
    Case("104M of 151,936 ids, sentence ends", "qwen_104m", 151_936, 1024, 960, 4, 8),
)


def measure(quick: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each case."""
    for case in CASES[:1] if quick else CASES:
        yield measure_case(case, 1 if quick else 3, folder)


def describe(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    return (
        f"{row['case']:<40} ours {row['ours_tokens_per_second']:>7,.0f} tokens/s, {row['ours_peak_gib']:.2f} GiB   "
        f"Hugging Face {row['hf_tokens_per_second']:>7,.0f}, {row['hf_peak_gib']:.2f} GiB: {row['ratio']:.2f} x "
        f"({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f}); largest difference {row['difference']:.1e}"
    )


def measure_case(case: Case, rounds: int, folder: Path) -> dict[str, Any]:
    """Run both sides in turn, after a warm-up round."""
    tokens = int((case.lengths() - 1).sum())
    rates: dict[str, list[float]] = {"ours": [], "hf": []}
    folder = folder / case.name.replace(" ", "_")
    make_model(case, folder / "model")
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Side(name, case, folder)) for name in rates}
        scores = {name: side.run()["scores"] for name, side in sides.items()}
        for number in range(rounds):
            for name in rates if number % 2 == 0 else reversed(rates):
                answer = sides[name].run()
                rates[name].append(tokens / answer["seconds"])
        peaks = {name: side.run()["peak_gib"] for name, side in sides.items()}
    ratios = sorted(a / b for a, b in zip(rates["ours"], rates["hf"], strict=True))
    return {
        "case": case.name, "parameters": case.architecture.parameters, "tokens": tokens, "rounds": rounds,
        "threads": torch.get_num_threads(), "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]], "target": LIMIT,
        "difference": float(np.abs(scores["ours"] / scores["hf"] - 1).max()),
        **{f"{name}_tokens_per_second": statistics.median(values) for name, values in rates.items()},
        **{f"{name}_peak_gib": peak for name, peak in peaks.items()},
    }  # fmt: skip


class Side:
    """A process that holds one model and scores the corpus on request."""

    def __init__(self, name: str, case: Case, folder: Path):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, case, folder, theirs))

    def __enter__(self) -> "Side":
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(False)
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()

    def run(self) -> dict[str, Any]:
        """Score once; return seconds, scores and peak memory so far."""
        self._pipe.send(True)
        return self._pipe.recv()


def serve(name: str, case: Case, folder: Path, pipe: Connection) -> None:
    """The body of a side's process."""
    silence_known_noise()
    with ExitStack() as stack:
        score = our_side(case, folder, stack) if name == "ours" else hugging_face_side(case, folder)
        while pipe.recv():
            started = time.perf_counter()
            scores = score()
            seconds = time.perf_counter() - started
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            pipe.send({"seconds": seconds, "scores": scores, "peak_gib": peak})


def chunks_of(case: Case) -> list[np.ndarray]:
    """Return the corpus: random ids without an end of document."""
    generator = np.random.default_rng(2)
    return [generator.integers(1, case.vocab_size, length) for length in case.lengths()]


def make_model(case: Case, folder: Path) -> None:
    """Save one set of weights as a Hugging Face folder, for both sides."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    shape = case.architecture
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=case.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups, max_position_embeddings=case.seq_length,
        tie_word_embeddings=shape.tie_word_embeddings, rope_theta=shape.rope_theta, rms_norm_eps=shape.norm_epsilon,
        initializer_range=shape.init_std,
    )).save_pretrained(folder)  # fmt: skip


def our_side(case: Case, folder: Path, stack: ExitStack) -> Callable[[], np.ndarray]:
    """Build the scorer of ``score_corpus`` on one rank."""
    from megatron_kd.checkpoints.hf_folder import HFFolder
    from megatron_kd.models.gpt import build_model
    from megatron_kd.parallel.groups import create_process_groups
    from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
    from megatron_kd.parallel.runtime import distributed_runtime
    from megatron_kd.scoring.chunk_losses import chunk_losses
    from megatron_kd.scoring.score_corpus import mean_losses
    from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

    vocabulary = plain_tokenizer_info(case.vocab_size, 0)
    dataset = write_chunk_dataset(folder / "chunks", chunks_of(case), vocabulary, case.seq_length)
    runtime = stack.enter_context(distributed_runtime())
    layout = ParallelLayout.for_world(ParallelConfig(), 1)
    groups = create_process_groups(layout)
    source = HFFolder(folder / "model")
    model = build_model(
        source.architecture, layout, groups, precision="fp32", device=runtime.device,
        max_sequence_length=case.seq_length,
    )  # fmt: skip
    source.load_into(model)
    return lambda: mean_losses(chunk_losses(model, groups, dataset, device=runtime.device, micro_batch_size=case.rows))


def hugging_face_side(case: Case, folder: Path) -> Callable[[], np.ndarray]:
    """Build a scorer with transformers' model over padded batches."""
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    chunks = chunks_of(case)

    @torch.no_grad()
    def score() -> np.ndarray:
        means = []
        for start in range(0, len(chunks), case.rows):
            rows = [torch.from_numpy(chunk) for chunk in chunks[start : start + case.rows]]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            mask = torch.arange(ids.shape[1] - 1) < lengths[:, None] - 1
            logits = model(input_ids=ids[:, :-1], attention_mask=mask.long(), use_cache=False).logits
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            losses = losses.view(mask.shape) * mask
            means.append((losses.sum(1) / mask.sum(1)).numpy())
        return np.concatenate(means)

    return score
