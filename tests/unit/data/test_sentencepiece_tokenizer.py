import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron_kd.data.chunking import Chunker, SentenceEnds
from megatron_kd.data.tokenization import load_tokenizer
from megatron_kd.data.tokenizer_engine import (
    DocumentEncoder,
    choose_engine,
    concatenated,
    encode_by_library,
    join_documents,
)
from megatron_kd.errors import DataError
from tests.unit.data.literal_chunking import LiteralBuffer


@pytest.fixture(scope="module")
def model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE model with byte fallback, as Llama 2's."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.splitlines() if line), model_writer=buffer,
        vocab_size=700, model_type="bpe", byte_fallback=True, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False, num_threads=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(buffer.getvalue())
    return path


def test_ids_are_sentencepiece_s_with_either_engine(model: Path, texts: list[str]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    expected = [processor.encode(text) for text in texts]
    for path in (model, model.parent):  # the file, and the folder that holds it
        tokenizer = load_tokenizer(path)
        assert (tokenizer.info.eos_id, tokenizer.bos_id) == (processor.eos_id(), processor.bos_id())
        assert tokenizer.info.vocab_size == processor.vocab_size() and "tokenizer.model" in tokenizer.info.files
        check = choose_engine(tokenizer, texts)
        assert check.engine in ("gigatoken", "sentencepiece") and check.documents > len(texts)
        for engine in {check.engine, "sentencepiece"}:
            ids, lengths = DocumentEncoder(tokenizer, engine).encode(texts)
            assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == expected
    assert choose_engine(tokenizer, texts, "tokenizers").engine == "sentencepiece"
    assert load_tokenizer(model, eos_token="<s>").info.hash != tokenizer.info.hash


def test_bytes_per_token_count_the_text(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    text = "Some plain words, Zwölf 你好 and code(); twice."
    ids, _ = concatenated(encode_by_library(tokenizer.backend, [text]))
    assert tokenizer.info.token_byte_lengths[ids].sum() == len(text.encode()) + 1  # the dummy prefix is a space
    assert tokenizer.info.token_byte_lengths[tokenizer.info.eos_id] == 0


@pytest.mark.parametrize("bos", [False, True])
def test_sentence_ends_against_the_literal_rule_on_real_text(model: Path, texts: list[str], bos: bool) -> None:
    """Decoding a pair is not decoding two ids here: a piece's leading space shows only after another piece."""
    tokenizer = load_tokenizer(model)
    ids, lengths = join_documents(zip(encode_by_library(tokenizer.backend, texts)), tokenizer.info.eos_id, np.uint32)
    bos_id = tokenizer.bos_id if bos else None
    chunks = Chunker(65, SentenceEnds.of(tokenizer), bos_id).add(ids, lengths, [""] * len(lengths))
    decode = lambda pair: tokenizer.backend.decode(pair, skip_special_tokens=False)  # noqa: E731
    literal = LiteralBuffer(65, tokenizer.info.eos_id, tokenizer.token_texts, decode, bos_id)
    expected = [chunk for part in np.split(ids, np.cumsum(lengths)[:-1]) for chunk in literal.add(part.tolist())]
    assert [part.tolist() for part in np.split(chunks.ids, np.cumsum(chunks.lengths)[:-1])] == expected
    assert len(expected) > 100 and len(set(chunks.lengths.tolist())) > 10


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="a.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "a.model")
