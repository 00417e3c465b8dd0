"""The keys of ``convert_from_hf`` and ``convert_to_hf``. Imports no torch."""

from dataclasses import dataclass
from typing import Iterator

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class ConvertFromHFConfig:
    """The keys of ``convert_from_hf``."""

    input: str
    """A folder with config.json, safetensors and a tokenizer."""
    output: str
    verify: bool = True
    """Compare the logits of the result with transformers' (both models in fp32 in memory)."""
    seq_length: int | None = None
    """Sequence length in the manifest; None means the model's own limit."""


@dataclass(frozen=True)
class ConvertToHFConfig:
    """The keys of ``convert_to_hf``."""

    input: str
    """A checkpoint, or a run folder, which means its newest."""
    output: str
    verify: bool = True
    """Compare the logits of the result in transformers with Megatron-Core's (both models in fp32 in memory)."""
    tokenizer: str | None = None
    """Folder with the tokenizer's files; None means the one of the dataset that the checkpoint was trained on."""
    max_shard_size: str = "5GB"

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        try:
            parse_size(self.max_shard_size)
        except ValueError as error:
            yield f"'max_shard_size': {error}, as in 5GB"


def parse_size(text: str) -> int:
    """Return the bytes of ``5GB``, ``200MB`` or ``40KB``.

    Raises:
        ValueError: it is something else.
    """
    number, unit = text[:-2], text[-2:]
    if not (number.isascii() and number.isdigit() and int(number) > 0 and unit in _UNITS):
        raise ValueError(f"'{text}' is not a whole number with KB, MB or GB")
    return int(number) * _UNITS[unit]
