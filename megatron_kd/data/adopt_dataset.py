"""``adopt_dataset``: existing token files as a chunk dataset: links, an index, checksums and a manifest.

    python tools/adopt_dataset.py input='pile/data_*.bin' sequences=chunks tokenizer=… output=… data.seq_length=1024

No id is copied: ``chunks-00000.bin`` is a symbolic link. ``sequences=chunks``: every sequence of the file is a chunk
(MiniPLM's released shards). ``sequences=documents``: the file is a stock Megatron document dataset, and its chunks are
consecutive windows of ``seq_length + 1`` ids, as ``chunking: packed`` cuts them. Only lengths and offsets of the old
index are read, so one whose document part is not Megatron's (MiniPLM's) serves as well.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.artefacts.checksums import BLOCK_BYTES, ChecksumStream, FileChecksums
from megatron_kd.artefacts.manifest import already_made, recipe_of
from megatron_kd.config import to_mapping
from megatron_kd.data.chunk_dataset import KIND, ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.corpus_files import expand_inputs
from megatron_kd.data.indexed_dataset import ForeignIndex, write_index
from megatron_kd.data.tokenization import LoadedTokenizer, load_tokenizer
from megatron_kd.data.tokenize_corpus import ChunkLengthConfig
from megatron_kd.data.workers import cpu_count
from megatron_kd.errors import DataError
from megatron_kd.logs import progress_bar

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 16 * BLOCK_BYTES
_EOS_SAMPLE = 1000


@dataclass(frozen=True)
class AdoptDatasetConfig:
    """Keys of ``adopt_dataset``: ``.bin`` files or globs, what their sequences are, and the tokenizer of their ids."""

    input: tuple[str, ...]
    sequences: Literal["chunks", "documents"]
    tokenizer: str
    output: str
    data: ChunkLengthConfig
    eos_token: str | None = None


def run(config: AdoptDatasetConfig) -> str:
    """Write the manifest and indices, and return the path of the dataset.

    Raises:
        DataError: a file is missing or does not fit its index, the tokenizer or ``data.seq_length``.
    """
    paths = [path for path in expand_inputs(config.input) if not path.endswith(".idx")]
    tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    recipe = _recipe(config, paths, tokenizer)
    if already_made(config.output, KIND, recipe):
        ChunkDataset.open(config.output)
        logger.info(f"{config.output}: already adopted from these files")
        return config.output
    sources = [_Source(config, Path(path)) for path in paths]
    with (
        building(config.output) as folder,
        closing(ChunkDatasetWriter(folder, tokenizer.info, config.data.seq_length)) as writer,
    ):
        total = sum(len(source.index.buffer) for source in sources)
        with progress_bar(total, "adopt") as bar:
            for source in sources:
                source.add_to(writer, tokenizer, bar)
        facts = {
            "unused_tokens": sum(source.unused for source in sources),
            "share_with_eos": _share_with_eos(sources, tokenizer.info.eos_id, config.sequences),
        }
        inputs = [{"path": str(source.bin_path), "bytes": len(source.index.buffer)} for source in sources]
        producer = {"tool": "adopt_dataset", "config": to_mapping(config), "inputs": inputs, **facts, "recipe": recipe}
        if not writer.num_chunks:
            raise DataError(f"{', '.join(config.input)}: no whole chunk of {config.data.seq_length + 1} ids in it")
        fingerprint = writer.finish(producer)
    doubt = "" if facts["share_with_eos"] else "; no end of a document was found: is this the right tokenizer?"
    logger.info(
        f"{config.output} has {writer.num_chunks} chunks, {writer.num_tokens} tokens in {len(sources)} adopted files, "
        f"fingerprint {fingerprint[:12]}{doubt}"
    )
    return config.output


class _Source:
    """One ``.bin`` file with its index."""

    def __init__(self, config: AdoptDatasetConfig, path: Path) -> None:
        self.bin_path = path.with_name(path.name.removesuffix(".bin") + ".bin").absolute()
        self.index = ForeignIndex(self.bin_path.with_suffix(""))
        self._length = config.data.seq_length + 1
        self._windows = config.sequences == "documents"
        lengths = self.index.lengths
        if not self._windows and len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= self._length:
            raise DataError(
                f"{self.index.index_path}: sequences of {lengths.min()} to {lengths.max()} ids, where chunks have 1 to "
                f"{self._length}; set data.seq_length, or sequences=documents if they are documents"
            )
        num_tokens = int(lengths.sum(dtype=np.int64))
        self.unused = num_tokens % self._length if self._windows else 0

    def chunk_lengths(self) -> np.ndarray:
        """Return the ids per chunk, int32 ``[chunks]``."""
        if not self._windows:
            return self.index.lengths
        count = int(self.index.lengths.sum(dtype=np.int64)) // self._length
        return np.full(count, self._length, dtype=np.int32)

    def add_to(self, writer: ChunkDatasetWriter, tokenizer: LoadedTokenizer, bar: Any) -> None:
        """Link the file into the dataset under construction; index and checksum it."""
        if self.index.dtype != writer.dtype:
            raise DataError(
                f"{self.bin_path}: ids of {self.index.dtype}, where a vocabulary of {tokenizer.info.vocab_size} is "
                f"stored as {writer.dtype}: give the tokenizer that the file was made with, or rewrite the file"
            )
        prefix = writer.next_shard_prefix()
        link = prefix.with_name(f"{prefix.name}.bin")
        link.symlink_to(self.bin_path)
        lengths = self.chunk_lengths()
        index = write_index(prefix.with_name(f"{prefix.name}.idx"), lengths, self.index.dtype)
        files = {f"{prefix.name}.bin": self._checksum(tokenizer.info.vocab_size, bar), f"{prefix.name}.idx": index}
        unused = self.unused * self.index.dtype.itemsize
        writer.add_shard(files, len(lengths), int(lengths.sum(dtype=np.int64)), unused)

    def _checksum(self, vocab_size: int, bar: Any) -> FileChecksums:
        """Compute the file's block checksums, and make sure that every id is in the vocabulary."""
        buffer = self.index.buffer
        starts = range(0, len(buffer), SEGMENT_BYTES)

        def segment(start: int) -> np.ndarray:
            piece = buffer[start : start + SEGMENT_BYTES]
            ids = piece.view(self.index.dtype)
            if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
                raise DataError(
                    f"{self.bin_path}: ids from {ids.min()} to {ids.max()} near byte {start}, but the tokenizer has "
                    f"{vocab_size}; give the tokenizer that the file was made with"
                )
            stream = ChecksumStream()
            stream.update(piece)
            bar.update(len(piece))
            return stream.finish().blocks

        with ThreadPoolExecutor(min(16, cpu_count())) as pool:
            blocks = list(pool.map(segment, starts))
        return FileChecksums(len(buffer), np.concatenate(blocks) if blocks else np.zeros(0, np.uint32))


def _share_with_eos(sources: Sequence[_Source], eos_id: int, sequences: str) -> float:
    """Return the share of documents that end with eos, or of chunks that hold it, among up to 1,000 of each file."""
    found = total = 0
    for source in sources:
        for number in np.unique(np.linspace(0, len(source.index) - 1, _EOS_SAMPLE).astype(np.int64)).tolist():
            ids = source.index[number] if len(source.index) else source.index.buffer[:0]
            ids = ids[-1:] if sequences == "documents" else ids
            found += bool((ids == eos_id).any())
            total += 1
    return found / total if total else 0.0


def _recipe(config: AdoptDatasetConfig, paths: Sequence[str], tokenizer: LoadedTokenizer) -> str:
    inputs = [[path, os.path.getsize(path), os.stat(path).st_mtime_ns] for path in paths]
    return recipe_of(
        {
            "tool": "adopt_dataset",
            "inputs": inputs,
            "sequences": config.sequences,
            "seq_length": config.data.seq_length,
            "tokenizer": tokenizer.info.hash,
        }
    )
