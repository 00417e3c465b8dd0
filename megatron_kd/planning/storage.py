"""Bytes on disk: chunk datasets, score files, and what a cache of the teacher's knowledge would take a token.

Caches as ``cache_teacher_logits`` writes them (docs/teacher_cache.md); the whole distribution only for comparison.
"""

from dataclasses import dataclass

ID_BYTES, WIDE_ID_BYTES = 2, 4
SMALLEST_WIDE_VOCABULARY = 65_500
INDEX_BYTES_PER_CHUNK = 20  # length (4), pointer (8), document index (8)
SCORE_BYTES = 4
FULL_LOGIT_BYTES = 2  # bf16
TOP_K = 64
DRAWS, DIFFERENT_IDS = 50, 12.1
"""Mean number of different ids among 50 draws (Sparse Logit Sampling, arXiv 2503.16870)."""
HEAD_IDS, HEAD_BITS, REST_BITS = 8, 16, 11
TOKEN_BITS = 17
"""Of every token: whether it has knowledge, and its tail mass."""
CACHE_INDEX_BYTES_PER_CHUNK = 28


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a teacher cache."""

    name: str
    bytes_per_token: float
    total: float


def corpus_bytes(tokens: float, vocab_size: int, seq_length: int) -> float:
    """A chunk dataset of ``tokens`` ids: data and index."""
    ids = WIDE_ID_BYTES if vocab_size >= SMALLEST_WIDE_VOCABULARY else ID_BYTES
    return tokens * ids + tokens / (seq_length + 1) * INDEX_BYTES_PER_CHUNK


def score_bytes(tokens: float, seq_length: int) -> float:
    """A score file: one float a chunk."""
    return tokens / (seq_length + 1) * SCORE_BYTES


def top_k_bytes(k: int, vocab_size: int) -> float:
    """A token of the codec ``top_k``."""
    head, rest = min(k, HEAD_IDS), max(k - HEAD_IDS, 0)
    return (k * _bits(vocab_size - 1) + HEAD_BITS * head + REST_BITS * rest + TOKEN_BITS) / 8


def sampled_bytes(draws: int, different_ids: float, vocab_size: int) -> float:
    """A token of the codec ``sampled``."""
    count_bits = _bits(draws)
    return (different_ids * (_bits(vocab_size - 1) + count_bits) + count_bits + TOKEN_BITS) / 8


def cache_sizes(tokens: float, vocab_size: int, seq_length: int) -> list[CacheSize]:
    """The teacher's knowledge about ``tokens`` in each form."""
    index = CACHE_INDEX_BYTES_PER_CHUNK / seq_length
    per_token = {
        "full distribution, bf16": FULL_LOGIT_BYTES * vocab_size,
        f"top_k, {TOP_K} ids": top_k_bytes(TOP_K, vocab_size) + index,
        f"sampled, {DRAWS} draws, {DIFFERENT_IDS} ids": sampled_bytes(DRAWS, DIFFERENT_IDS, vocab_size) + index,
    }
    return [CacheSize(name, size, size * tokens) for name, size in per_token.items()]


def _bits(largest: int) -> int:
    return largest.bit_length()
