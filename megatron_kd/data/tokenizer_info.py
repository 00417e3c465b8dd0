"""What a dataset records of its tokenizer; free of tokenizer libraries, so that training needs none."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class TokenizerInfo:
    """Identity and facts of a tokenizer.

    Attributes:
        hash: content hash (``data/tokenization.py``).
        vocab_size: largest id + 1.
        eos_id: ends a document.
        pad_id: fills the right of short rows; equal to ``eos_id``, as in the Qwen, Llama 3.1 and Mamba recipes, which
            is what makes the loss mask leave out positions whose input is eos (``data/batch.py``).
        token_byte_lengths: UTF-8 bytes per id, int32 ``[vocab_size]``, 0 for special tokens.
        files: name → contents of the files that make it up; empty for synthetic data.
    """

    hash: str
    vocab_size: int
    eos_id: int
    pad_id: int
    token_byte_lengths: np.ndarray
    files: Mapping[str, bytes] = field(default_factory=dict)

    def copy_files(self, dataset_folder: Path) -> list[str]:
        """Write its files into ``<dataset_folder>/tokenizer/``; returns their names relative to the dataset."""
        if not self.files:
            return []
        (dataset_folder / TOKENIZER_FOLDER).mkdir()
        for name, contents in self.files.items():
            (dataset_folder / TOKENIZER_FOLDER / name).write_bytes(contents)
        return [f"{TOKENIZER_FOLDER}/{name}" for name in self.files]


def plain_tokenizer_info(vocab_size: int, eos_id: int = 0) -> TokenizerInfo:
    """A tokenizer without files whose every id but eos stands for one byte: for synthetic data."""
    lengths = np.ones(vocab_size, dtype=np.int32)
    lengths[eos_id] = 0
    return TokenizerInfo(f"plain-{vocab_size}-{eos_id}", vocab_size, eos_id, eos_id, lengths)


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file belongs to a tokenizer, by its name: a model's folder holds others beside them."""
    return path.is_file() and path.name.startswith(
        ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")
    )
