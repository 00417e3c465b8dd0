import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_kd.data import chunking
from megatron_kd.data.chunking import Chunker, DomainChunker, SentenceEnds
from megatron_kd.data.tokenization import LoadedTokenizer, load_tokenizer
from megatron_kd.data.tokenizer_engine import encode_by_library, join_documents
from tests.unit.data.literal_chunking import LiteralBuffer

EOS = 0
# a toy vocabulary that has every case: plain, spaced, each sentence end, brackets with and without their closing
TOY_TEXTS = ["<eos>", "a", " b", ".", "!", " ?", ";\n", "\n", "[.", "[.]", "(!", "\\.", "\\{.", "<;>", "{."]
TOY_LETTERS = st.integers(1, len(TOY_TEXTS) - 1)


def toy_decode(ids: list[int]) -> str:
    return "".join(TOY_TEXTS[index] for index in ids)


def split(chunks: chunking.Chunks) -> list[list[int]]:
    return (
        [part.tolist() for part in np.split(chunks.ids, np.cumsum(chunks.lengths)[:-1])] if len(chunks.lengths) else []
    )


def joined(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([index for ids in documents for index in ids], np.uint32), np.array([len(ids) for ids in documents])


def test_which_ids_may_end_a_sentence() -> None:
    ends = SentenceEnds(TOY_TEXTS, EOS)
    certain = [TOY_TEXTS[i] for i in range(len(TOY_TEXTS)) if ends.last_in(np.array([i, 1]), 0, 1) == 0]
    if_spaced = [TOY_TEXTS[i] for i in range(len(TOY_TEXTS)) if ends.last_in(np.array([i, 2]), 0, 1) == 0]
    assert certain == ["<eos>", " ?", ";\n", "\n"]  # " ?" has the space itself
    assert if_spaced == ["<eos>", ".", "!", " ?", ";\n", "\n", "[.]", "\\{.", "<;>", "{."]  # braces are not paired
    assert ends.count == len(if_spaced)


def test_it_looks_back_as_far_as_the_chunk_goes() -> None:
    ends = SentenceEnds(TOY_TEXTS, EOS)
    stream = np.ones(1000, dtype=np.uint16)
    assert ends.last_in(stream, 0, 1000) == -1
    for place in (0, 63, 64, 700, 999):
        stream[:] = 1
        stream[place] = EOS
        assert ends.last_in(stream, 0, 1000) == place
        assert ends.last_in(stream, place + 1, 1000) == -1


@settings(deadline=None, max_examples=200)
@given(
    documents=st.lists(st.tuples(st.sampled_from("xyz"), st.lists(TOY_LETTERS, max_size=25)), min_size=1, max_size=12),
    length=st.integers(2, 9),
    bos=st.booleans(),
    chunk_limit=st.sampled_from([1, 2, 3, 2000]),
    cuts=st.lists(st.integers(1, 5), max_size=6),
    pairwise=st.booleans(),
)
def test_sentence_ends_against_the_literal_rule(
    documents: list[tuple[str, list[int]]], length: int, bos: bool, chunk_limit: int, cuts: list[int], pairwise: bool
) -> None:
    """Chunks, their order across domains, and what stays in the buffers, however the documents are cut into calls."""
    bos_id = 1 if bos else None
    pair_has_space = (lambda one, other: " " in toy_decode([one, other])) if pairwise else None
    limit = chunking.MAX_CHUNKS_PER_DOCUMENT
    chunking.MAX_CHUNKS_PER_DOCUMENT = chunk_limit
    try:
        fast = Chunker(length, SentenceEnds(TOY_TEXTS, EOS, pair_has_space), bos_id)
        found: list[list[int]] = []
        rest = documents
        for cut in [*cuts, len(documents)]:
            part, rest = rest[:cut], rest[cut:]
            if part:
                ids, lengths = joined([[*ids, EOS] for _, ids in part])
                found += split(fast.add(ids, lengths, [domain for domain, _ in part]))
    finally:
        chunking.MAX_CHUNKS_PER_DOCUMENT = limit
    literal: dict[str, LiteralBuffer] = {}
    expected: list[list[int]] = []
    for domain, ids in documents:
        if domain not in literal:
            literal[domain] = LiteralBuffer(length, EOS, TOY_TEXTS, toy_decode, bos_id, chunk_limit)
        expected += literal[domain].add([*ids, EOS])
    assert found == expected
    leftovers = [buffer.buffer for buffer in literal.values()]
    assert fast.num_buffered == sum(len(ids) - bos for ids in leftovers)
    assert split(fast.flush()) == [ids for ids in leftovers if len(ids) > 1]


@pytest.mark.parametrize("length", [17, 65, 257])
@pytest.mark.parametrize("bos", [False, True])
def test_sentence_ends_on_real_text(tokenizer: LoadedTokenizer, texts: list[str], length: int, bos: bool) -> None:
    check_on_real_text(tokenizer, texts, length, bos)


def test_sentence_ends_with_a_vocabulary_that_is_not_byte_level(
    tokenizer: LoadedTokenizer, tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    """A unigram model with Metaspace: decoding a pair drops a leading space, so pairs are decoded one by one."""
    from tokenizers import decoders, models, pre_tokenizers, trainers

    other = Tokenizer(models.Unigram())
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    other.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    other.train_from_iterator([text[:3000] for text in texts], trainer)
    path = tmp_path_factory.mktemp("unigram") / "tokenizer.json"
    other.save(str(path))
    loaded = load_tokenizer(path)
    assert not loaded.is_byte_level
    check_on_real_text(loaded, texts, 65, False)


def check_on_real_text(tokenizer: LoadedTokenizer, texts: list[str], length: int, bos: bool) -> None:
    eos_id = tokenizer.info.eos_id
    ids, lengths = join_documents(zip(encode_by_library(tokenizer.backend, texts)), eos_id, np.uint32)
    bos_id = 7 if bos else None
    fast = DomainChunker(length, SentenceEnds.of(tokenizer), bos_id)
    found = split(fast.add(ids, lengths)[0])
    decode = lambda pair: tokenizer.backend.decode(pair, skip_special_tokens=False)  # noqa: E731
    literal = LiteralBuffer(length, eos_id, tokenizer.token_texts, decode, bos_id)
    expected = [
        chunk for document in np.split(ids, np.cumsum(lengths)[:-1]) for chunk in literal.add(document.tolist())
    ]
    assert found == expected
    assert len({len(chunk) for chunk in expected}) > 5  # sentence ends do cut


def test_a_document_of_too_many_chunks_empties_the_buffer() -> None:
    ends = SentenceEnds(TOY_TEXTS, EOS)
    documents = [[1, EOS], [1] * 5 * 2000 + [EOS], [1] * 5 * 2001 + [3] * 3 + [EOS], [2, 1, 1, 1, 1, 1, EOS]]
    literal = LiteralBuffer(5, EOS, TOY_TEXTS, toy_decode)
    expected = [chunk for document in documents for chunk in literal.add(document)]
    chunker = DomainChunker(5, ends)
    chunks, completed_by = chunker.add(*joined(documents))
    assert split(chunks) == expected
    assert np.bincount(completed_by).tolist() == [0, 2000, 2000, 1]
    assert chunker.num_buffered == len(literal.buffer) == 2


@settings(deadline=None)
@given(
    documents=st.lists(st.tuples(st.sampled_from("xy"), st.lists(TOY_LETTERS, max_size=30)), min_size=1, max_size=10),
    length=st.integers(1, 9),
)
def test_packed_loses_nothing_and_keeps_the_order(documents: list[tuple[str, list[int]]], length: int) -> None:
    chunker = Chunker(length)
    ids, lengths = joined([[*ids, EOS] for _, ids in documents])
    found = split(chunker.add(ids, lengths, [domain for domain, _ in documents]))
    buffers: dict[str, list[int]] = {}
    expected: list[list[int]] = []
    for domain, document in documents:
        buffer = buffers.setdefault(domain, [])
        buffer += [*document, EOS]
        while len(buffer) >= length:
            expected.append(buffer[:length])
            del buffer[:length]
    assert found == expected
    assert split(chunker.flush()) == [buffer for buffer in buffers.values() if len(buffer) > 1]
    assert chunker.num_buffered == sum(len(buffer) == 1 for buffer in buffers.values())
