"""Bytes on disk: chunk datasets, score files, and what a cache of the teacher's knowledge would take a token.

Caches in their plain form: an id and a value an entry, without compression.
"""

from dataclasses import dataclass

ID_BYTES, WIDE_ID_BYTES = 2, 4
SMALLEST_WIDE_VOCABULARY = 65_500
INDEX_BYTES_PER_CHUNK = 20  # length (4), pointer (8), document index (8)
SCORE_BYTES = 4
FULL_LOGIT_BYTES = 2  # bf16
TOP_K_ENTRY_BYTES = 6  # 4-byte id, bf16 log-probability
SAMPLED_ENTRY_BYTES = 4  # 18-bit id and count in one word
SAMPLED_UNIQUE = {50: 12.1, 100: 19.0}
"""Mean number of different ids among N draws (Sparse Logit Sampling, arXiv 2503.16870)."""


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


def cache_sizes(tokens: float, vocab_size: int) -> list[CacheSize]:
    """The teacher's knowledge about ``tokens`` in each form."""
    per_token = {
        "full distribution, bf16": FULL_LOGIT_BYTES * vocab_size,
        "top 64": 64 * TOP_K_ENTRY_BYTES,
        "50 samples": SAMPLED_UNIQUE[50] * SAMPLED_ENTRY_BYTES,
    }
    return [CacheSize(name, size, size * tokens) for name, size in per_token.items()]
