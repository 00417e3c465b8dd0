"""Files that other programs wrote, byte by byte: MiniPLM's released shards, Megatron-LM's indexed datasets."""

import struct
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from torch import from_numpy

EOS = 0


def sequences(seed: int, count: int, longest: int, vocabulary: int = 600) -> list[np.ndarray]:
    """``count`` documents of up to ``longest`` ids, each with its end."""
    generator = np.random.default_rng(seed)
    return [np.append(generator.integers(1, vocabulary, generator.integers(1, longest)), EOS) for _ in range(count)]


def write_miniplm(prefix: Path, chunks: list[np.ndarray]) -> None:
    """A released shard: Megatron's header and arrays, but a document part of one entry that the header counts as n."""
    lengths = np.array([len(chunk) for chunk in chunks], np.int32)
    pointers = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)[:-1] * 2]).astype(np.int64)
    prefix.with_suffix(".bin").write_bytes(np.concatenate(chunks).astype(np.uint16).tobytes())
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(chunks), len(chunks))
    prefix.with_suffix(".idx").write_bytes(
        header + lengths.tobytes() + pointers.tobytes() + np.zeros(1, "<i8").tobytes()
    )


def write_megatron(prefix: Path, documents: list[np.ndarray]) -> None:
    """A document a sequence, by Megatron-Core's own builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for ids in documents:
        builder.add_item(from_numpy(ids.astype(np.int64)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
