"""Training runs inside the ranks of a test world, and what they left in their run folders."""

from pathlib import Path
from typing import Any

import numpy

from megatron_kd.config import load_config
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.metrics.tracker import read_metrics
from tests.distributed.ranks import shared_ranks
from tests.reference.datasets import plain_tokenizer_info, write_chunk_dataset

VOCABULARY = 300
SEQ_LENGTH = 32
OVERLAPPED = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
LAYOUTS = {
    "TP1 PP1": (1, []),
    "TP2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "TP2 SP": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "PP2 VPP2": (2, ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]),
    "CP2": (2, ["parallel.context_parallel_size=2"]),
    "DP2": (2, []),
    "DP2 overlapped": (2, OVERLAPPED),
    "TP2 PP2": (4, ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]),
    "PP2 DP2": (4, ["parallel.pipeline_model_parallel_size=2"]),
    "PP2 DP2 overlapped": (4, ["parallel.pipeline_model_parallel_size=2", *OVERLAPPED]),
    "TP2 SP DP2 overlapped": (
        4,
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", *OVERLAPPED],
    ),
    "CP2 DP2": (4, ["parallel.context_parallel_size=2"]),
    "TP2 SP CP2": (
        4,
        [
            "parallel.tensor_model_parallel_size=2",
            "parallel.sequence_parallel=true",
            "parallel.context_parallel_size=2",
        ],
    ),
    "PP2 CP2": (4, ["parallel.pipeline_model_parallel_size=2", "parallel.context_parallel_size=2"]),
}


def make_dataset(folder: Path, chunks: int = 96, seed: int = 0) -> ChunkDataset:
    """A chunk dataset of a second-order pattern with a few document ends and a few short chunks."""
    generator = numpy.random.default_rng(seed)
    successors = numpy.random.default_rng(99).integers(1, VOCABULARY, size=(VOCABULARY, 3))

    def chunk(index: int) -> numpy.ndarray:
        length = SEQ_LENGTH + 1 if index % 7 else int(generator.integers(2, SEQ_LENGTH))
        ids = numpy.zeros(length, dtype=numpy.int64)
        ids[0] = generator.integers(1, VOCABULARY)
        for t in range(1, length):
            ids[t] = 0 if generator.random() < 0.03 else successors[ids[t - 1], generator.integers(3)]
        return ids

    return write_chunk_dataset(
        folder, (chunk(i) for i in range(chunks)), plain_tokenizer_info(VOCABULARY, 0), SEQ_LENGTH
    )


def train_in_ranks(layout: str, settings: list[str], output: Path) -> list[dict[str, Any]]:
    """Run ``train`` under a layout; the rows of its metrics."""
    world, keys = LAYOUTS[layout]
    shared_ranks(world).run(train_here, [*settings, *keys, f"output={output}"], timeout=300)
    return read_metrics(output)


def train_here(settings: list[str]) -> None:
    """Run ``train`` on this rank of an existing world."""
    from megatron_kd.logs import silence_known_noise

    silence_known_noise()
    from megatron_kd.training.train import TrainConfig, run

    run(load_config(TrainConfig, None, settings))


def call_verb(module: str, config: str, settings: list[str]) -> Any:
    """Run another verb on this rank; returns what it returns."""
    import importlib

    loaded = importlib.import_module(module)
    return loaded.run(load_config(getattr(loaded, config), None, settings))


def largest_relative_difference(ours: list[dict[str, Any]], reference: list[dict[str, Any]], key: str) -> float:
    """max |a - b| / |b| over the steps of two runs."""
    assert len(ours) == len(reference), (len(ours), len(reference))
    return max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-12) for a, b in zip(ours, reference))


def whole_weights(run_folder: str) -> dict[str, Any]:
    """Every unsharded weight of a run's newest checkpoint (in a world of one)."""
    from tests.reference.full_state import load_full_state

    return load_full_state(run_folder)[1]
