"""The quickstart's tokenizer: a byte-level BPE trained on the quickstart's own text.

python -m megatron_kd.quickstart.tokenizer CORPUS.jsonl VOCAB_SIZE OUTPUT_FOLDER
"""

import sys
from pathlib import Path

from megatron_kd.cli import status_of
from megatron_kd.data.tokenization import train_byte_level_bpe
from megatron_kd.quickstart.text import read_texts


def main() -> None:
    """Train on every document of the corpus."""
    corpus, vocab_size, output = sys.argv[1:]
    train_byte_level_bpe(read_texts(Path(corpus)), int(vocab_size), output)
    sys.stdout.write(f"{output}: byte-level BPE of {vocab_size} ids\n")


if __name__ == "__main__":
    sys.exit(status_of("quickstart.tokenizer", main))
