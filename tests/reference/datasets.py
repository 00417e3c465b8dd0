"""Chunk datasets of ids that are in memory, and a tokenizer for ids without text."""

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.data.chunk_dataset import ChunkDataset, TokenizerInfo
from megatron_kd.data.chunk_dataset_writer import DEFAULT_CHUNKS_PER_SHARD, ChunkDatasetWriter


def write_chunk_dataset(
    output: str | Path,
    chunks: Iterable[np.ndarray],
    tokenizer: TokenizerInfo,
    seq_length: int,
    chunks_per_shard: int = DEFAULT_CHUNKS_PER_SHARD,
) -> ChunkDataset:
    """Write chunks that are in memory, whole or not at all, and open the result."""
    with (
        building(output) as folder,
        closing(ChunkDatasetWriter(folder, tokenizer, seq_length, chunks_per_shard)) as writer,
    ):
        for chunk in chunks:
            writer.add(chunk, np.array([len(chunk)]))
        writer.finish({"tool": "write_chunk_dataset"})
    return ChunkDataset.open(output)


def plain_tokenizer_info(vocab_size: int, eos_id: int = 0) -> TokenizerInfo:
    """A tokenizer without files whose every id but eos stands for one byte."""
    lengths = np.ones(vocab_size, dtype=np.int32)
    lengths[eos_id] = 0
    return TokenizerInfo(f"plain-{vocab_size}-{eos_id}", vocab_size, eos_id, eos_id, lengths)
