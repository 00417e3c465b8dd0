import logging
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_kd.data import tokenizer_engine
from megatron_kd.data.tokenization import LoadedTokenizer
from megatron_kd.data.tokenizer_engine import (
    HARD_TEXTS,
    DocumentEncoder,
    choose_engine,
    concatenated,
    encode_by_library,
)
from megatron_kd.errors import DataError


def test_gigatoken_is_chosen_and_the_sample_recorded(tokenizer: LoadedTokenizer, texts: list[str]) -> None:
    check = choose_engine(tokenizer, texts)
    assert check.engine == "gigatoken" and check.reason == ""
    assert check.documents == len(HARD_TEXTS) + len(texts)
    assert check.text_bytes == sum(len(text.encode()) for text in [*HARD_TEXTS, *texts])
    assert check.as_mapping()["documents"] == check.documents


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=8))
def test_both_engines_agree_on_any_text(tokenizer: LoadedTokenizer, texts: list[str]) -> None:
    fast = DocumentEncoder(tokenizer, "gigatoken").encode(texts)
    slow = DocumentEncoder(tokenizer, "tokenizers").encode(texts)
    for one, other in zip(fast, slow, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_difference_during_the_run_is_refused(tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = DocumentEncoder(tokenizer, "gigatoken")
    fast.spot_check(["short", "x" * 9000 + " some text", "é"])
    fast.spot_check([])
    monkeypatch.setattr(fast, "encode", lambda texts: (np.array([1, 2], dtype=np.uint32), np.array([2])))
    with pytest.raises(
        DataError, match="differ from tokenizers' on 'the middle one'; run again with engine=tokenizers"
    ):
        fast.spot_check(["first", "the middle one", "last"])
    DocumentEncoder(tokenizer, "tokenizers").spot_check(["nothing to compare"])


@pytest.mark.parametrize("fault", ["another id", "another length"])
def test_any_difference_falls_back(
    tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    def wrong(self: DocumentEncoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = concatenated(encode_by_library(tokenizer.backend, texts))
        if fault == "another id":
            ids[-1] += 1
        else:
            lengths[-1] -= 1
            ids = ids[:-1]
        return ids, lengths

    monkeypatch.setattr(tokenizer_engine.DocumentEncoder, "encode", wrong)
    with caplog.at_level(logging.WARNING):
        check = choose_engine(tokenizer, ["fine", "the last one"])
    assert check.engine == "tokenizers"
    assert "differ from tokenizers' on the sample, first on 'the last one'" in check.reason
    assert check.reason in caplog.text


def test_without_gigatoken_or_its_support_it_falls_back(
    tokenizer: LoadedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if it were not installed
    check = choose_engine(tokenizer, ["text"])
    assert check.engine == "tokenizers" and "gigatoken cannot encode with this tokenizer" in check.reason


def test_it_is_not_tried_when_not_wanted(tokenizer: LoadedTokenizer) -> None:
    assert choose_engine(tokenizer, ["text"], "tokenizers").reason == "the configuration asks for tokenizers"
