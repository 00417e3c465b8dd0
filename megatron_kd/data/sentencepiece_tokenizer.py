"""A SentencePiece model with the methods of ``tokenizers.Tokenizer`` that the data path uses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_kd.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """The ids of one text."""

    ids: list[int]


@dataclass(frozen=True)
class AddedPiece:
    """A control symbol of the model."""

    content: str
    special: bool = True


class SentencePieceTokenizer:
    """Encodes and decodes with the ``sentencepiece`` library.

    Args:
        model: the contents of a ``.model`` file.
        where: the file, for messages.

    Raises:
        DataError: it is not a SentencePiece model, or the library is missing.
    """

    decoder = None

    def __init__(self, model: bytes, where: str) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise DataError(f"{where}: a SentencePiece model; pip install sentencepiece to read it") from None
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
            size = self._processor.vocab_size()
        except (RuntimeError, TypeError) as error:
            raise DataError(f"{where}: not a SentencePiece model ({str(error)[:100]})") from None
        self._pieces = [self._processor.id_to_piece(index) for index in range(size)]
        self._ids = {piece: index for index, piece in enumerate(self._pieces)}
        self._special = {
            index for index in range(size) if self._processor.is_control(index) or self._processor.is_unknown(index)
        }

    @property
    def eos_token(self) -> str | None:
        """The model's own end symbol."""
        return self._piece_or_none(self._processor.eos_id())

    @property
    def bos_token(self) -> str | None:
        """The model's own begin symbol."""
        return self._piece_or_none(self._processor.bos_id())

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a piece; None if there is no such piece."""
        return self._ids.get(token)

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        """Return piece → id."""
        return dict(self._ids)

    def get_added_tokens_decoder(self) -> dict[int, AddedPiece]:
        """Return id → piece of the control symbols."""
        return {index: AddedPiece(self._pieces[index]) for index in sorted(self._special)}

    def encode_batch_fast(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[Encoded]:
        """Return the ids of every text, without begin and end symbols."""
        return [Encoded(ids) for ids in self._processor.encode(list(texts), num_threads=1)]

    def encode(self, text: str, add_special_tokens: bool = False) -> Encoded:
        """Return the ids of one text, without begin and end symbols."""
        return Encoded(self._processor.encode(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of some ids; control symbols are written out unless they are skipped."""
        parts: list[str] = []
        run: list[int] = []
        for index in ids:
            if index in self._special:
                parts.append(self._processor.decode(run) if run else "")
                parts.append("" if skip_special_tokens else self._pieces[index])
                run = []
            else:
                run.append(int(index))
        return "".join(parts) + (self._processor.decode(run) if run else "")

    def decode_batch(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """Return :meth:`decode` of each sequence."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def _piece_or_none(self, index: int) -> str | None:
        return self._pieces[index] if 0 <= index < len(self._pieces) else None
