"""Tokenizers: loading, identity, bytes per token, training a byte-level BPE.

A tokenizer is a Hugging Face folder with ``tokenizer.json``, such a file alone, or a SentencePiece ``.model`` (also as
``tokenizer.model`` of a folder without ``tokenizer.json``). ``tokenizer_engine.py`` encodes with it.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.data.chunk_dataset import TokenizerInfo
from megatron_kd.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_kd.errors import DataError

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOS_TOKEN = "<|endoftext|>"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
_FILES = (
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_USUAL_EOS = (EOS_TOKEN, "</s>", "<|end_of_text|>", "<eos>")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer in memory.

    Attributes:
        path: where it was loaded from.
        backend: the ``tokenizers`` object, or one with the same methods.
        files: name → contents of the files that make it up.
        eos_id: ends a document.
        cleans_up_spaces: whether its configuration makes decoding remove spaces before punctuation.
        bos_id: begins a text; None if the tokenizer names none.
    """

    path: Path
    backend: Tokenizer | SentencePieceTokenizer
    files: dict[str, bytes]
    eos_id: int
    cleans_up_spaces: bool
    bos_id: int | None

    @cached_property
    def info(self) -> TokenizerInfo:
        """What datasets record of the tokenizer; a process that only encodes does not need it."""
        lengths = token_byte_lengths(self.backend)
        return TokenizerInfo(self._hash, len(lengths), self.eos_id, self.eos_id, lengths, self.files)

    @property
    def _hash(self) -> str:
        if SENTENCEPIECE_MODEL in self.files:
            return _sentencepiece_hash(self.files[SENTENCEPIECE_MODEL], self.eos_id)
        return tokenizer_hash(json.loads(self.files[TOKENIZER_JSON]), self.eos_id)

    @cached_property
    def token_texts(self) -> list[str]:
        """Decoded text of every single id, ``[vocab_size]``, special tokens included."""
        one_each = [[token] for token in range(self.info.vocab_size)]
        return self.backend.decode_batch(one_each, skip_special_tokens=False)

    @property
    def library(self) -> str:
        """The library of the backend, with which gigatoken is compared: ``tokenizers`` or ``sentencepiece``."""
        return "sentencepiece" if SENTENCEPIECE_MODEL in self.files else "tokenizers"

    @property
    def is_byte_level(self) -> bool:
        """Whether decoding concatenates the bytes of the ids, each the same in every context."""
        return _is_byte_level(self.backend)


def load_tokenizer(path: str | Path, eos_token: str | None = None) -> LoadedTokenizer:
    """Load a Hugging Face tokenizer folder, a ``tokenizer.json`` file or a SentencePiece model.

    Args:
        path: the folder or file.
        eos_token: the token that ends a document; None takes the folder's ``eos_token``, or the model's own.

    Raises:
        DataError: there is no such tokenizer, it is not readable, or its end-of-document token is unknown.
    """
    path = Path(path)
    files = _read_files(path)
    if SENTENCEPIECE_MODEL in files:
        return _load_sentencepiece(path, files, eos_token)
    try:
        backend = Tokenizer.from_str(files[TOKENIZER_JSON].decode("utf-8"))
        settings = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        raise DataError(f"{path}: not a readable tokenizer ({error})") from None
    backend.no_padding()
    backend.no_truncation()
    eos = eos_token or _token_text(settings.get("eos_token")) or _guess_eos(backend)
    eos_id = backend.token_to_id(eos) if eos else None
    if eos is None or eos_id is None:
        raise DataError(f"{path}: the end-of-document token {eos!r} is not in the vocabulary; set eos_token")
    if TOKENIZER_CONFIG not in files:
        files[TOKENIZER_CONFIG] = _config_text(eos).encode()
    bos = _token_text(settings.get("bos_token"))
    return LoadedTokenizer(
        path,
        backend,
        files,
        eos_id,
        bool(settings.get("clean_up_tokenization_spaces", False)),
        backend.token_to_id(bos) if bos else None,
    )


def _load_sentencepiece(path: Path, files: dict[str, bytes], eos_token: str | None) -> LoadedTokenizer:
    model = files[SENTENCEPIECE_MODEL]
    backend = SentencePieceTokenizer(model, str(path))
    try:
        settings = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
    except ValueError as error:
        raise DataError(f"{path / TOKENIZER_CONFIG}: not valid JSON ({error})") from None
    eos = eos_token or _token_text(settings.get("eos_token")) or backend.eos_token
    eos_id = backend.token_to_id(eos) if eos else None
    if eos is None or eos_id is None:
        raise DataError(f"{path}: the end-of-document token {eos!r} is not in the vocabulary; set eos_token")
    files.setdefault(TOKENIZER_CONFIG, json.dumps({"eos_token": eos, "pad_token": eos}, indent=2).encode() + b"\n")
    bos = _token_text(settings.get("bos_token")) or backend.bos_token
    return LoadedTokenizer(
        path,
        backend,
        files,
        eos_id,
        bool(settings.get("clean_up_tokenization_spaces", False)),
        backend.token_to_id(bos) if bos else None,
    )


def tokenizer_hash(content: dict[str, Any], eos_id: int) -> str:
    """Return the hash of what decides the ids: model, normalizer, pre-tokenizer, added tokens and the eos id.

    Two ``tokenizer.json`` that differ only in layout, key order, or settings for padding, truncation and decoding have
    the same hash: SHA-256, 32 hexadecimal digits.
    """
    model = dict(content["model"])
    if "merges" in model:
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    kept = {
        "model": {key: value for key, value in model.items() if value not in (None, False, "")},
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content.get("pre_tokenizer"),
        "added_tokens": sorted(content.get("added_tokens") or [], key=lambda token: token["id"]),
        "eos_id": eos_id,
    }
    text = json.dumps(kept, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def hashes_in_folder(folder: Path, eos_id: int) -> list[str]:
    """Return the content hashes, with this eos id, of every form in which a folder holds its tokenizer.

    Raises:
        DataError: its ``tokenizer.json`` is not readable.
    """
    found = []
    if (folder / TOKENIZER_JSON).is_file():
        try:
            content = json.loads((folder / TOKENIZER_JSON).read_text(encoding="utf-8"))
            found.append(tokenizer_hash(content, eos_id))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / TOKENIZER_JSON}: not a readable tokenizer ({error})") from None
    if (folder / SENTENCEPIECE_MODEL).is_file():
        found.append(_sentencepiece_hash((folder / SENTENCEPIECE_MODEL).read_bytes(), eos_id))
    return found


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file belongs to a tokenizer, by its name; a model's folder holds other files too."""
    return path.is_file() and path.name.startswith(
        ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")
    )


def _sentencepiece_hash(model: bytes, eos_id: int) -> str:
    return hashlib.sha256(model + f"|eos_id={eos_id}".encode()).hexdigest()[:32]


def token_byte_lengths(backend: Tokenizer | SentencePieceTokenizer) -> np.ndarray:
    """Return the UTF-8 bytes that each id stands for, int32 ``[vocab_size]``; 0 for special tokens and unused ids.

    Byte-level vocabularies write each byte as one character; others write a space as ``▁`` and a byte as ``<0x41>``.
    """
    vocabulary = backend.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    byte_level = _is_byte_level(backend)
    for token, index in vocabulary.items():
        if byte_level:
            lengths[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("▁", " ").encode("utf-8"))
    for index, added in backend.get_added_tokens_decoder().items():
        lengths[index] = 0 if added.special else len(added.content.encode("utf-8"))
    return lengths


def _empty_byte_level_bpe() -> Tokenizer:
    """Return a tokenizer with Qwen2's normalisation and pre-tokenization, and no vocabulary yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, output: str | Path) -> Path:
    """Train a byte-level BPE with Qwen2's normalisation and pre-tokenization, and save it as a folder.

    Equal texts in equal order give equal files. ``transformers.AutoTokenizer`` reads the folder; its eos and pad token
    is ``<|endoftext|>``, with id 0.

    Args:
        texts: the training documents.
        vocab_size: number of ids, at least 257 (256 bytes and eos).
        output: folder to create.

    Raises:
        DataError: ``output`` exists, ``vocab_size`` is too small, or the texts are too few for that many ids.
    """
    if vocab_size < 257:
        raise DataError(f"a byte-level vocabulary needs at least 257 ids (256 bytes and eos), not {vocab_size}")
    tokenizer = _empty_byte_level_bpe()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(EOS_TOKEN, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size(with_added_tokens=True)
    if found != vocab_size:
        raise DataError(
            f"the training texts give only {found} ids of {vocab_size}; give more text or ask for fewer ids"
        )
    with building(output) as folder:
        (folder / TOKENIZER_JSON).write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
        (folder / TOKENIZER_CONFIG).write_text(_config_text(EOS_TOKEN), encoding="utf-8")
    return Path(output)


def _read_files(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {SENTENCEPIECE_MODEL if path.suffix == ".model" else TOKENIZER_JSON: path.read_bytes()}
    if not path.is_dir():
        raise DataError(
            f"{path}: no such tokenizer; give a Hugging Face folder, a tokenizer.json or a SentencePiece model"
        )
    files = {name: (path / name).read_bytes() for name in _FILES if (path / name).is_file()}
    model = path / SENTENCEPIECE_MODEL
    if TOKENIZER_JSON not in files and model.is_file():
        kept = {name: data for name, data in files.items() if name in (TOKENIZER_CONFIG, "special_tokens_map.json")}
        return {**kept, SENTENCEPIECE_MODEL: model.read_bytes()}
    if TOKENIZER_JSON not in files:
        raise DataError(f"{path}: holds no {TOKENIZER_JSON}; save it there with transformers' fast tokenizer first")
    return files


def _is_byte_level(backend: Tokenizer | SentencePieceTokenizer) -> bool:
    return isinstance(backend.decoder, decoders.ByteLevel)


def _token_text(entry: Any) -> str | None:
    return entry.get("content") if isinstance(entry, dict) else entry


def _guess_eos(backend: Tokenizer) -> str | None:
    found = [token for token in _USUAL_EOS if backend.token_to_id(token) is not None]
    return found[0] if len(found) == 1 else None


def _config_text(eos_token: str) -> str:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": eos_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    return json.dumps(settings, indent=2) + "\n"
