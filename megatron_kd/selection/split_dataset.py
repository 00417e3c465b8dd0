"""``split_dataset``: a random part of a chunk dataset, and the rest.

The part is a reference split by chunk, or the chunks that a proxy learns from.

    python tools/split_dataset.py data.path=CORPUS fraction=0.05 output=REFERENCE rest_output=REST role=reference

Which chunks are drawn depends on the seed and the chunks' ids in the root alone; both parts keep the root ids, so they
are disjoint for every tool that compares them, and scores of the whole serve them.
"""

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.artefacts.manifest import already_made, recipe_of
from megatron_kd.config import to_mapping
from megatron_kd.data.chunk_dataset import KIND, ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.copy_chunks import copy_chunks
from megatron_kd.data.random_numbers import hash64, hash_int
from megatron_kd.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitDataConfig:
    """The ``data.*`` keys of splitting."""

    path: str
    """The chunk dataset to split."""


@dataclass(frozen=True)
class SplitDatasetConfig:
    """Keys of ``split_dataset``."""

    data: SplitDataConfig
    fraction: float
    """Share of the chunks that is drawn; exactly floor(fraction · n)."""
    output: str
    rest_output: str | None = None
    role: str = "sample"
    """``reference`` marks the drawn part as training data of a reference model, which must not score it."""
    seed: int = 0

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if not 0 < self.fraction < 1:
            yield f"fraction must be above 0 and below 1, not {self.fraction}"
        if self.output == self.rest_output:
            yield "output and rest_output must differ"


def run(config: SplitDatasetConfig) -> str:
    """Write the drawn part and, if it has an output, the rest; return the path of the former.

    Raises:
        DataError: the dataset is missing or damaged; a part would be empty; an output exists and is something else.
    """
    dataset = ChunkDataset.open(config.data.path)
    drawn = draw_chunks(dataset, config.fraction, config.seed)
    if not drawn.any() or drawn.all():
        raise DataError(
            f"{config.data.path}: fraction {config.fraction} of {len(dataset)} chunks leaves a part empty; change it"
        )
    parts = [(config.output, config.role, np.flatnonzero(drawn))]
    if config.rest_output is not None:
        parts.append((config.rest_output, "train", np.flatnonzero(~drawn)))
    for output, role, kept in parts:
        _write(config, dataset, output, role, kept)
    return config.output


def draw_chunks(dataset: ChunkDataset, fraction: float, seed: int) -> np.ndarray:
    """Return which chunks are drawn, bool ``[num_chunks]``: those whose root ids have the smallest keys."""
    keys = hash64(np.asarray(dataset.chunk_ids).astype(np.uint64) ^ np.uint64(hash_int(seed)))
    count = int(fraction * len(keys))
    drawn = np.zeros(len(keys), dtype=bool)
    drawn[np.argpartition(keys, count)[:count]] = True
    return drawn


def _write(config: SplitDatasetConfig, dataset: ChunkDataset, output: str, role: str, kept: np.ndarray) -> None:
    recipe = recipe_of({
        "tool": "split_dataset", "parent": dataset.fingerprint, "fraction": config.fraction, "seed": config.seed,
        "role": role, "is_rest": output == config.rest_output,
    })  # fmt: skip
    if already_made(output, KIND, recipe):
        ChunkDataset.open(output)
        logger.info(f"{output}: already made from this dataset")
        return
    per_shard = max(len(shard) for shard in dataset.shards)
    with (
        building(output) as folder,
        closing(ChunkDatasetWriter(folder, dataset.tokenizer_info(), dataset.seq_length, per_shard)) as writer,
    ):
        copy_chunks(dataset, kept, writer)
        fingerprint = writer.finish(
            {"tool": "split_dataset", "config": to_mapping(config), "role": role, "recipe": recipe},
            [{"kind": KIND, "path": str(dataset.path), "fingerprint": dataset.fingerprint}],
            dataset.root_fingerprint,
            dataset.root_ids(kept),
        )
    logger.info(f"{len(kept)} of {len(dataset)} chunks, {role}: {output}, {fingerprint[:12]}")
