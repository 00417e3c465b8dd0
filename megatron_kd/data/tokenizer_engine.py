"""Encode documents with the fastest engine that gives the same ids as the ``tokenizers`` library.

gigatoken is tried first. It is used only if it agrees with ``tokenizers`` on a sample of the corpus and on texts that
tokenizers are known to disagree on; the outcome goes into the dataset's manifest. On any difference, or if it does not
support the tokenizer, ``tokenizers`` is used. During the run a part of every block is compared again.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from megatron_kd.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_kd.data.tokenization import SENTENCEPIECE_MODEL, TOKENIZER_JSON, LoadedTokenizer
from megatron_kd.errors import DataError

logger = logging.getLogger(__name__)
Engine = Literal["auto", "tokenizers"]
SAMPLE_BYTES = 1 << 20
SPOT_CHECK_CHARACTERS = 1500
HARD_TEXTS = (
    "",
    " ",
    "  two  spaces \t tabs\t\t\n\n\r\n line ends \r",
    "don't WE'LL I'M they'VE it's 'tis",
    "1234567890 3.14159 1e-9 0x1F",
    "e\u0301 \u00e9 \u212b \ufb01 \u1e9b\u0323 A\u030a",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u3053\u3093\u306b\u3061\u306f \uc548\ub155 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f600",
    "\u00a0nbsp\u2003em space\u3000ideographic\u200bzero width\ufeffbom",
    "\x00\x01\x7f\x85\u2028\u2029 control",
    "<|endoftext|>after <|im_start|> <s></s> <unk>",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # comment\n",
    "\u0663\u0664\u0665 \u2167 \u00bd \u00b2 \u0e51",
)


@dataclass(frozen=True)
class EngineCheck:
    """Which engine encodes the corpus and how it was checked; recorded in the manifest.

    Attributes:
        engine: ``gigatoken``, ``tokenizers`` or ``sentencepiece``.
        documents, text_bytes: size of the sample that was compared.
        reason: why gigatoken is not used, or "".
    """

    engine: str
    documents: int
    text_bytes: int
    reason: str = ""

    def as_mapping(self) -> dict[str, object]:
        """Return the manifest's entry."""
        return asdict(self)


class DocumentEncoder:
    """Encodes documents without special tokens, with one engine.

    Args:
        tokenizer: a loaded tokenizer.
        engine: ``gigatoken`` or ``tokenizers``.
    """

    def __init__(self, tokenizer: LoadedTokenizer, engine: str) -> None:
        self._backend = tokenizer.backend
        self._gigatoken = None
        if engine == "gigatoken":
            import gigatoken

            files = tokenizer.files
            if tokenizer.library == "sentencepiece":
                self._gigatoken = gigatoken.Tokenizer.from_sentencepiece(files[SENTENCEPIECE_MODEL])
            else:
                self._gigatoken = gigatoken.Tokenizer.from_json(files[TOKENIZER_JSON].decode("utf-8"))

    def pieces(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each document, uint32."""
        if self._gigatoken is None:
            return encode_by_library(self._backend, texts)
        # On one thread a call per document is as fast as one for all, and does not load awkward (0.3 s per process).
        return [self._gigatoken.encode(text) for text in texts]

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids, uint32 ``[sum]``, one document after another, and their lengths, int64 ``[n]``."""
        return concatenated(self.pieces(texts))

    def spot_check(self, texts: Sequence[str]) -> None:
        """Compare the engine with ``tokenizers`` on the middle of one document, in about 1% of a block's encoding time.

        Raises:
            DataError: the ids differ, though those of the sample agreed.
        """
        if self._gigatoken is None or not texts:
            return
        text = texts[len(texts) // 2]
        middle = max(0, len(text) - SPOT_CHECK_CHARACTERS) // 2
        part = text[middle : middle + SPOT_CHECK_CHARACTERS]
        if not np.array_equal(self.encode([part])[0], encode_by_library(self._backend, [part])[0]):
            raise DataError(
                f"gigatoken's ids differ from tokenizers' on {part[:60]!r}; run again with engine=tokenizers"
            )


def encode_by_library(backend: Tokenizer | SentencePieceTokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode with ``tokenizers`` or ``sentencepiece``, without special tokens: the ids of each document, uint32."""
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


def concatenated(pieces: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of n pieces one after another, uint32 ``[sum]``, and their lengths, int64 ``[n]``."""
    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    return np.concatenate(pieces) if len(pieces) else np.zeros(0, np.uint32), lengths


def join_documents(
    documents: Iterable[Sequence[np.ndarray]], eos_id: int, dtype: np.dtype | str
) -> tuple[np.ndarray, np.ndarray]:
    """Join documents' ids, each ended by ``eos_id``.

    Args:
        documents: the pieces of each of n documents: a text, or a prompt and a response.
        dtype: of the result; the vocabulary must fit.

    Returns:
        ids ``[sum + n]``, and lengths int64 ``[n]`` with eos counted.
    """
    eos = np.array([eos_id], dtype=dtype)
    flat: list[np.ndarray] = []
    lengths: list[int] = []
    for pieces in documents:
        flat += [*pieces, eos]
        lengths.append(sum(map(len, pieces)) + 1)
    ids = np.concatenate(flat, dtype=dtype, casting="unsafe") if flat else eos[:0]
    return ids, np.array(lengths, dtype=np.int64)


def choose_engine(tokenizer: LoadedTokenizer, sample: Sequence[str], wanted: Engine = "auto") -> EngineCheck:
    """Decide which engine encodes the corpus.

    Args:
        tokenizer: a loaded tokenizer.
        sample: documents of the corpus, about ``SAMPLE_BYTES`` of text.
        wanted: ``auto`` uses gigatoken if it agrees; ``tokenizers`` does not try it.
    """
    if wanted == "tokenizers":
        return EngineCheck(tokenizer.library, 0, 0, f"the configuration asks for {tokenizer.library}")
    texts = [*HARD_TEXTS, *sample]
    text_bytes = sum(len(text.encode("utf-8")) for text in texts)
    try:
        ids, lengths = DocumentEncoder(tokenizer, "gigatoken").encode(texts)
    except Exception as error:  # noqa: BLE001 - whatever it cannot do, tokenizers can
        return _fall_back(EngineCheck(tokenizer.library, 0, 0, f"gigatoken cannot encode with this tokenizer: {error}"))
    expected_ids, expected_lengths = concatenated(encode_by_library(tokenizer.backend, texts))
    if not (np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected_ids)):
        first = _first_difference(ids, lengths, expected_ids, expected_lengths)
        reason = f"gigatoken's ids differ from {tokenizer.library}' on the sample, first on {texts[first][:60]!r}"
        return _fall_back(EngineCheck(tokenizer.library, len(texts), text_bytes, reason))
    return EngineCheck("gigatoken", len(texts), text_bytes)


def _fall_back(check: EngineCheck) -> EngineCheck:
    logger.warning("encoding with %s, which is slower: %s", check.engine, check.reason)
    return check


def _first_difference(ids: np.ndarray, lengths: np.ndarray, others: np.ndarray, other_lengths: np.ndarray) -> int:
    pairs = zip(np.split(ids, np.cumsum(lengths)[:-1]), np.split(others, np.cumsum(other_lengths)[:-1]), strict=True)
    return next(number for number, (one, other) in enumerate(pairs) if not np.array_equal(one, other))
