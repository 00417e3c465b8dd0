"""Teacher caches on a CPU: bytes per token and what they cost in accuracy; speed of writing, reading and training.

    python benchmarks/bench_cache.py [--quick] [--only size,exact,…] [--output benchmarks/results/cache.json]

    size    bytes per token of each codec at 151,936 ids, on a synthetic distribution with 12.1 distinct ids in 50 draws
    exact   loss and gradient of a decoded top-64 target against the target before quantization
    write   the codec alone, encoding and writing: MB/s of one process, and of two at once
    read    random access: tokens/s that one rank turns into a loss's input, first touch and after
    cache   writing a teacher's shards against its forward pass with its output layer alone, alternating
    step    a training step with a cached teacher against one without a teacher, alternating

One thread per process. Ratios are medians over rounds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cache_parts import (  # noqa: E402
    DRAWS,
    TEACHERS,
    UNIQUE_IDS,
    VOCABULARY,
    entries_of,
    in_processes,
    random_dataset,
    synthetic_teachers,
    write_shard,
    zipf_exponent,
)
from benchmarks.provenance import provenance  # noqa: E402
from megatron_kd.logs import silence_known_noise  # noqa: E402
from megatron_kd.teachers.cache.codecs import SampledCodec, TopKCodec, TopPCodec  # noqa: E402

CODECS = {
    "top_k 64": TopKCodec(64, VOCABULARY),
    "top_p 0.95, at most 64": TopPCodec(64, VOCABULARY, top_p=0.95),
    "sampled, 50 draws": SampledCodec(DRAWS, VOCABULARY),
    "weighted, 50 draws": SampledCodec(DRAWS, VOCABULARY, proposal_exponent=0.9),
}


def main() -> None:
    """Run the chosen parts; print and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller inputs")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, separated by commas")
    parser.add_argument("--output", type=Path, help="JSON file for the results; parts not measured now stay in it")
    options = parser.parse_args()
    silence_known_noise()
    torch.set_num_threads(1)
    for name in options.only.split(","):
        origin = provenance()
        with tempfile.TemporaryDirectory() as folder:
            rows = PARTS[name](options.quick, Path(folder))
        sys.stdout.write(json.dumps({name: rows}, indent=1) + "\n")
        sys.stdout.flush()
        if options.output is not None:
            record(options.output, name, {"quick": options.quick, "provenance": origin, "rows": rows})


def record(path: Path, name: str, part: dict[str, Any]) -> None:
    """Put a part into a record, beside or instead of those that it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["results"] if path.exists() else {}
    path.write_text(json.dumps({"benchmark": "cache", "results": {**before, name: part}}, indent=2) + "\n")


def measure_size(quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Measure bytes per token, and the bound of 3 per distinct id + 5 for draws."""
    head = synthetic_teachers(np.full(TEACHERS, zipf_exponent(UNIQUE_IDS, DRAWS)))
    tokens, rows = 1024, []
    for name, codec in CODECS.items():
        entries = entries_of(codec, head, tokens)
        size = len(codec.encode(np.ones(tokens, dtype=bool), entries)) / tokens
        ids = len(entries.ids) / tokens
        rows.append(
            {
                "codec": name,
                "ids_per_token": round(ids, 3),
                "bytes_per_token": round(size, 3),
                "bound_3_ids_plus_5": round(3 * ids + 5, 3),
                "mean_tail_mass": float(entries.tail.mean()),
            }
        )
    return rows  # fmt: skip


def measure_exactness(quick: bool, folder: Path) -> dict[str, Any]:
    """Compare losses of a noisy copy of the teacher; every token has a teacher of its own, from flat to peaked."""
    from megatron_kd.losses import DistillationObjective, OutputHead, SparseKnowledge, linear_distillation_loss

    teacher = synthetic_teachers(np.linspace(0.3, 3.0, TEACHERS), seed=1)
    noise = torch.randn(VOCABULARY, TEACHERS, generator=torch.Generator().manual_seed(2))
    codec = CODECS["top_k 64"]
    entries = entries_of(codec, teacher, TEACHERS)
    decoded = codec.decode(codec.encode(np.ones(TEACHERS, dtype=bool), entries), TEACHERS, len(entries.ids))

    def loss_and_gradient(weights: np.ndarray, tail: np.ndarray, scale: float) -> tuple[float, torch.Tensor]:
        student = torch.nn.Parameter(teacher.weight * (1 - 0.3 * scale) + scale * noise)
        knowledge = SparseKnowledge(
            torch.from_numpy(entries.ids.reshape(TEACHERS, -1).astype(np.int64)),
            torch.from_numpy(weights.reshape(TEACHERS, -1)), torch.from_numpy(tail), "ghost",
        )  # fmt: skip
        result = linear_distillation_loss(
            torch.eye(TEACHERS), OutputHead(student, VOCABULARY), torch.zeros(TEACHERS, dtype=torch.long),
            torch.ones(TEACHERS), DistillationObjective(lm_weight=0.0, kd_weight=1.0), knowledge,
        )  # fmt: skip
        result.loss_sum.backward()
        return float(result.loss_sum.detach()) / TEACHERS, student.grad

    figures = {}
    for label, scale in (("near the teacher", 0.5), ("far from it", 2.0)):
        exact, gradient = loss_and_gradient(entries.columns["probabilities"], entries.tail, scale)
        ours, our_gradient = loss_and_gradient(decoded.weights, decoded.tail, scale)
        cosine = torch.nn.functional.cosine_similarity(gradient, our_gradient, dim=0)  # a column is a token's gradient
        figures[label] = {"loss": exact, "loss_error_nats": abs(ours - exact), "smallest_cosine": float(cosine.min())}
    return figures


def measure_writing(quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Measure one process, then two at once, each into its own shard."""
    head = synthetic_teachers(np.full(TEACHERS, zipf_exponent(UNIQUE_IDS, DRAWS)))
    rows = []
    for name in ("top_k 64", "sampled, 50 draws"):
        entries, chunks = entries_of(CODECS[name], head, 1024), 300 if quick else 1500
        rates: dict[int, list[float]] = {1: [], 2: []}
        for number in range(2 if quick else 5):
            for processes in (1, 2):
                items = [(CODECS[name], entries, chunks, str(folder / f"{number}-{processes}-{i}"))
                         for i in range(processes)]  # fmt: skip
                results = in_processes(write_shard, items)
                rates[processes].append(sum(size for _, size in results) / max(s for s, _ in results) / 1e6)
        ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
        rows.append(
            {
                "codec": name,
                "mb_per_second_one": statistics.median(rates[1]),
                "mb_per_second_two": statistics.median(rates[2]),
                "scaling": statistics.median(ratios),
            }
        )
    return rows  # fmt: skip


def measure_reading(quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Turn batches of 8 chunks of 1,024 tokens, in random order, into the loss's input."""
    from megatron_kd.data.batch import make_batch
    from megatron_kd.teachers.cached import CachedTeacher
    from tests.reference.caches import write_cache

    dataset = random_dataset(folder / "data", 64 if quick else 256, 1024, VOCABULARY)
    rows = []
    for name, codec in CODECS.items():
        cache = write_cache(dataset, folder / name.replace(" ", "_"), codec, chunks_per_shard=50)
        teacher = CachedTeacher(cache, dataset, codec.target_kind("auto", name))
        order = np.random.default_rng(1).permutation(dataset.num_chunks).reshape(-1, 8)
        batches = [make_batch(dataset, indices, 1024) for indices in order]
        rates = []
        for _ in range(3):
            started = time.perf_counter()
            for batch in batches:
                teacher.begin_step([batch])
                teacher.knowledge(batch)
            rates.append(dataset.num_chunks * 1024 / (time.perf_counter() - started))
        rows.append(
            {
                "codec": name,
                "ids_per_token": cache.manifest["ids_per_token"],
                "tokens_per_second_first_touch": rates[0],
                "tokens_per_second": statistics.median(rates[1:]),
            }
        )
    return rows  # fmt: skip


def measure_caching(quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Write shards of a 104M teacher at 151,936 ids."""
    from benchmarks.cache_sides import caching_sides

    rows = []
    for name in ("top_k 64", "sampled, 50 draws"):
        with caching_sides(folder / name.replace(" ", "_"), CODECS[name], chunks=2 if quick else 8) as (alone, caching):
            rows.append({"codec": name, **alternate(alone, caching, 2 if quick else 5)})
    return rows


def measure_steps(quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Train a 21M student at 32,000 ids: LM loss alone, and with a cached teacher."""
    from benchmarks.cache_sides import step_sides

    rows = []
    for name in ("top_k", "sampled"):
        with step_sides(folder / name, name) as (alone, cached):
            rows.append({"codec": name, **alternate(alone, cached, 2 if quick else 9)})
    return rows


def alternate(base: Callable[[], Any], other: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Return median seconds of both after a warm-up, and the median of the rounds' ratios."""
    base(), other()
    seconds: list[tuple[float, float]] = []
    for number in range(rounds):
        order = (base, other) if number % 2 == 0 else (other, base)
        took = {}
        for side in order:
            started = time.perf_counter()
            side()
            took[side] = time.perf_counter() - started
        seconds.append((took[base], took[other]))
    return {
        "seconds_alone": statistics.median(a for a, _ in seconds),
        "seconds_with": statistics.median(b for _, b in seconds),
        "ratio": statistics.median(b / a for a, b in seconds),
    }


PARTS: dict[str, Callable[[bool, Path], Any]] = {
    "size": measure_size,
    "exact": measure_exactness,
    "write": measure_writing,
    "read": measure_reading,
    "cache": measure_caching,
    "step": measure_steps,
}

if __name__ == "__main__":
    main()
