"""``convert_tokenization``: a chunk dataset in the ids of another tokenizer, chunk by chunk.

A Llama or Mamba student can so learn from chunks that a Qwen teacher chose (MiniPLM, arXiv 2410.17215, and its released
``convert_tokenization``).

    chunk → pieces between the old eos → text → new ids → joined by the new eos → (bos in front) → cut to L

Chunk i of the result is chunk i of the input. ``source_chunk_ids.npy`` holds each chunk's id in the input's root: the
result is a root of its own, so that scores and caches of the old ids are never used for the new ones.
"""

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.artefacts.manifest import already_made, recipe_of
from megatron_kd.config import to_mapping
from megatron_kd.data.chunk_dataset import KIND, ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.tokenization import LoadedTokenizer, load_tokenizer
from megatron_kd.data.workers import cpu_count, worker_pool
from megatron_kd.errors import DataError
from megatron_kd.logs import progress_bar

logger = logging.getLogger(__name__)

SOURCE_IDS_NAME = "source_chunk_ids.npy"
BLOCK_CHUNKS = 512


@dataclass(frozen=True)
class ConvertedDataConfig:
    """The ``data.*`` keys of converting."""

    path: str
    """The chunk dataset to convert."""


@dataclass(frozen=True)
class ConvertTokenizationConfig:
    """Keys of ``convert_tokenization``."""

    data: ConvertedDataConfig
    tokenizer: str
    """The new tokenizer: a Hugging Face folder or tokenizer.json."""
    output: str
    seq_length: int | None = None
    """A chunk has at most one id more; None for the input's."""
    prepend_bos: bool = False
    """Put bos in front, for models that were trained with it (Llama, Mistral); it counts in the length."""
    eos_token: str | None = None
    workers: int = 0
    """Processes; 0 for one per core."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if self.seq_length is not None and self.seq_length < 1:
            yield f"seq_length must be at least 1, not {self.seq_length}"
        if self.workers < 0:
            yield f"workers must not be negative, not {self.workers}"


class ChunkConverter:
    """Converts chunks of ids from one tokenizer to another.

    Args:
        old, new: the tokenizers.
        length: L, ids of a converted chunk at most.
        prepend_bos: put the new tokenizer's bos in front.
    """

    def __init__(self, old: LoadedTokenizer, new: LoadedTokenizer, length: int, prepend_bos: bool) -> None:
        self._old, self._new, self._length = old, new, length
        self._bos = [new.bos_id] if prepend_bos else []

    def __call__(self, chunks: list[np.ndarray]) -> tuple[list[np.ndarray], int]:
        """Return the converted chunks, one for each, and how many ids were cut off."""
        pieces = [_split_at(chunk, self._old.info.eos_id) for chunk in chunks]
        flat = [piece.tolist() for of_chunk in pieces for piece in of_chunk]
        texts = self._old.backend.decode_batch(flat, skip_special_tokens=True)
        encoded: Iterator[Any] = iter(self._new.backend.encode_batch_fast(texts, add_special_tokens=False))
        results, num_cut = [], 0
        for of_chunk in pieces:
            ids = list(self._bos)
            for _ in of_chunk:
                ids += [*next(encoded).ids, self._new.info.eos_id]
            ids.pop()  # the eos behind the last piece: it ends there only if the chunk did, which makes an empty piece
            num_cut += max(0, len(ids) - self._length)
            del ids[self._length :]
            if len(ids) <= 1:
                ids.append(self._new.info.eos_id)
            results.append(np.array(ids, dtype=np.int64))
        return results, num_cut


def run(config: ConvertTokenizationConfig) -> str:
    """Convert a dataset and return the path of the result.

    Raises:
        DataError: the dataset is missing, damaged, has no tokenizer or leaves prompts out of the loss; the new
            tokenizer is unreadable, or has no bos for ``prepend_bos``; the output exists and is something else.
    """
    dataset = ChunkDataset.open(config.data.path)
    old, new = _tokenizers(config, dataset)
    seq_length = config.seq_length or dataset.seq_length
    recipe = recipe_of({
        "tool": "convert_tokenization", "parent": dataset.fingerprint, "tokenizer": new.info.hash,
        "seq_length": seq_length, "prepend_bos": config.prepend_bos,
    })  # fmt: skip
    if already_made(config.output, KIND, recipe):
        ChunkDataset.open(config.output)
        logger.info(f"{config.output}: already made from this dataset with this tokenizer")
        return config.output
    with building(config.output) as folder, closing(_writer(folder, dataset, new, seq_length)) as writer:
        num_cut = _convert(config, dataset, seq_length, writer)
        writer.add_array(SOURCE_IDS_NAME, np.asarray(dataset.root_ids(np.arange(len(dataset)))))
        if dataset.domains is not None:
            writer.add_domains(dataset.domain_names, dataset.domains)
        fingerprint = writer.finish(
            _producer(config, dataset, num_cut, recipe),
            [{"kind": KIND, "path": str(dataset.path), "fingerprint": dataset.fingerprint}],
        )
    share = num_cut / max(1, num_cut + writer.num_tokens)
    logger.info(
        f"{len(dataset)} chunks, {dataset.num_tokens} ids to {writer.num_tokens} ({share:.2%} cut off beyond "
        f"{seq_length + 1}); {config.output}, fingerprint {fingerprint[:12]}"
    )
    return config.output


def _tokenizers(config: ConvertTokenizationConfig, dataset: ChunkDataset) -> tuple[LoadedTokenizer, LoadedTokenizer]:
    if not dataset.tokenizer_path.is_dir():
        raise DataError(f"{dataset.path}: has no tokenizer folder, so its ids cannot be decoded; convert one that has")
    if dataset.masks_prompts:
        raise DataError(
            f"{dataset.path}: leaves prompts out of the loss, and where they end cannot be converted; tokenise its "
            "text with tokenize_corpus and the new tokenizer"
        )
    old, new = load_tokenizer(dataset.tokenizer_path), load_tokenizer(config.tokenizer, config.eos_token)
    if config.prepend_bos and new.bos_id is None:
        raise DataError(f"{config.tokenizer}: names no bos_token, which prepend_bos=true needs; set prepend_bos=false")
    if old.info.hash == new.info.hash:
        raise DataError(
            f"{config.tokenizer}: is the tokenizer of {dataset.path} itself ({new.info.hash}); give another one"
        )
    return old, new


def _writer(folder: Path, dataset: ChunkDataset, new: LoadedTokenizer, seq_length: int) -> ChunkDatasetWriter:
    per_shard = max((len(shard) for shard in dataset.shards), default=1)
    return ChunkDatasetWriter(folder, new.info, seq_length, per_shard)


def _convert(config: ConvertTokenizationConfig, dataset: ChunkDataset, seq_length: int, writer: Any) -> int:
    """Write all chunks in order, and return how many ids were cut off."""
    settings = (str(dataset.path), config.tokenizer, config.eos_token, seq_length + 1, config.prepend_bos)
    total = len(dataset)
    blocks = [(start, min(start + BLOCK_CHUNKS, total)) for start in range(0, total, BLOCK_CHUNKS)]
    workers = min(config.workers or cpu_count(), len(blocks))
    num_cut = 0
    with progress_bar(total, "convert", "chunk") as bar:
        for ids, lengths, cut in _in_order(settings, blocks, workers):
            writer.add(ids, lengths)
            num_cut += cut
            bar.update(len(lengths))
    return num_cut


class _BlockConverter:
    """Reads and converts intervals of a dataset's chunks; one in each process."""

    def __init__(self, path: str, tokenizer: str, eos_token: str | None, length: int, prepend_bos: bool) -> None:
        self._dataset = ChunkDataset.open(path)
        old, new = load_tokenizer(self._dataset.tokenizer_path), load_tokenizer(tokenizer, eos_token)
        self._convert = ChunkConverter(old, new, length, prepend_bos)

    def __call__(self, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
        chunks, num_cut = self._convert([self._dataset[index] for index in range(*block)])
        return np.concatenate(chunks), np.array([len(chunk) for chunk in chunks], dtype=np.int64), num_cut


_converter_of = lru_cache(maxsize=1)(_BlockConverter)


def _convert_block(settings: tuple[Any, ...], block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
    return _converter_of(*settings)(block)


def _in_order(
    settings: tuple[Any, ...], blocks: list[tuple[int, int]], workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield converted blocks in order, a few per worker ahead at most."""
    if workers <= 1:
        yield from map(_BlockConverter(*settings), blocks)
        return
    with worker_pool(workers) as pool:
        waiting = []
        for block in blocks:
            waiting.append(pool.submit(_convert_block, settings, block))
            if len(waiting) > 3 * workers:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _split_at(chunk: np.ndarray, eos_id: int) -> list[np.ndarray]:
    """Split a chunk at its eos ids, empty pieces included, as ``str.split`` does."""
    places = np.flatnonzero(chunk == eos_id)
    bounds = zip([0, *(places + 1).tolist()], [*places.tolist(), len(chunk)], strict=True)
    return [chunk[start:stop] for start, stop in bounds]


def _producer(config: ConvertTokenizationConfig, dataset: ChunkDataset, num_cut: int, recipe: str) -> dict[str, Any]:
    return {
        "tool": "convert_tokenization",
        "config": {**to_mapping(config), "workers": 0},
        "source_root_fingerprint": dataset.root_fingerprint,
        "source_tokenizer_hash": dataset.tokenizer_hash,
        "tokens_cut_off": num_cut,
        "recipe": recipe,
    }
