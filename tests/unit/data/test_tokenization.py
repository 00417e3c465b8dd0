import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from megatron_kd.data.tokenization import (
    LoadedTokenizer,
    load_tokenizer,
    token_byte_lengths,
    tokenizer_hash,
    train_byte_level_bpe,
)
from megatron_kd.data.tokenizer_engine import HARD_TEXTS, concatenated, encode_by_library, join_documents
from megatron_kd.errors import DataError


def test_training_is_the_same_in_another_process(tmp_path: Path, tokenizer_folder: Path, texts: list[str]) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    program = (
        "import json, sys; from megatron_kd.data.tokenization import train_byte_level_bpe;"
        f"train_byte_level_bpe(iter(json.load(open('{tmp_path}/texts.json'))), 600, '{tmp_path}/again')"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={"PYTHONHASHSEED": "5", "PYTHONPATH": ":".join(sys.path)}
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tokenizer_folder / name).read_bytes()


def test_transformers_loads_it_and_agrees(tmp_path: Path, tokenizer_folder: Path, tokenizer: LoadedTokenizer) -> None:
    loaded = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    assert (len(loaded), loaded.eos_token_id, loaded.pad_token_id) == (600, 0, 0)
    for text in HARD_TEXTS:
        ids, _ = concatenated(encode_by_library(tokenizer.backend, [text]))
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    loaded.save_pretrained(str(tmp_path / "saved"))  # as an exporter does
    assert load_tokenizer(tmp_path / "saved").info.hash == tokenizer.info.hash


def test_qwen2s_pre_tokenization(tokenizer: LoadedTokenizer) -> None:
    pieces = [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("I'LL take 12 of\n\n it!! \n")]
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in pieces] == [
        "I", "'LL", " take", " ", "1", "2", " of", "\n\n", " it", "!!", " \n",
    ]  # fmt: skip
    assert tokenizer.backend.normalizer.normalize_str("e\u0301") == "\u00e9"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bytes_per_token_add_up_to_the_texts(tokenizer: LoadedTokenizer, text: str) -> None:
    normal = tokenizer.backend.normalizer.normalize_str(text)
    ids, lengths = concatenated(encode_by_library(tokenizer.backend, [text]))
    if "<|endoftext|>" not in text:
        assert tokenizer.info.token_byte_lengths[ids].sum() == len(normal.encode())
    assert lengths.tolist() == [len(ids)]


def test_special_tokens_have_no_bytes_and_other_added_ones_have_theirs(tokenizer: LoadedTokenizer) -> None:
    assert tokenizer.info.token_byte_lengths[0] == 0
    other = Tokenizer.from_str(tokenizer.backend.to_str())
    other.add_tokens(["wörd"])
    other.add_special_tokens(["<|im_end|>"])
    assert token_byte_lengths(other)[600:].tolist() == [5, 0]


def test_bytes_per_token_of_a_vocabulary_with_byte_fallback() -> None:
    vocabulary = {"<unk>": 0, "<0x41>": 1, "▁hi": 2, "é": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>"])
    assert token_byte_lengths(tokenizer).tolist() == [0, 1, 3, 2]


def test_the_hash_is_of_what_decides_the_ids(tokenizer_folder: Path, tokenizer: LoadedTokenizer) -> None:
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    same = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    same["padding"] = {"strategy": "BatchLongest"}
    same["truncation"] = {"max_length": 5}
    same["post_processor"] = None
    same["model"]["merges"] = [
        " ".join(pair) if isinstance(pair, list) else pair.split(" ") for pair in same["model"]["merges"]
    ]
    assert tokenizer_hash(same, 0) == tokenizer_hash(content, 0) == tokenizer.info.hash
    assert tokenizer_hash(content, 1) != tokenizer.info.hash
    for change in (
        lambda c: c["model"]["merges"].reverse(),
        lambda c: c["model"]["vocab"].update(new=600),
        lambda c: c.update(normalizer=None),
        lambda c: c["added_tokens"][0].update(lstrip=True),
        lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0),
    ):
        other = json.loads((tokenizer_folder / "tokenizer.json").read_text())
        change(other)
        assert tokenizer_hash(other, 0) != tokenizer.info.hash


def test_a_file_alone_is_a_tokenizer(tmp_path: Path, tokenizer_folder: Path, tokenizer: LoadedTokenizer) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    alone = load_tokenizer(path)
    assert alone.info.hash == tokenizer.info.hash
    for name, contents in alone.info.files.items():
        (tmp_path / name).write_bytes(contents)
    assert AutoTokenizer.from_pretrained(str(tmp_path)).eos_token == "<|endoftext|>"


def test_only_the_tokenizers_files_are_taken(tmp_path: Path, tokenizer_folder: Path) -> None:
    for path in tokenizer_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert set(load_tokenizer(tmp_path).info.files) == {"tokenizer.json", "tokenizer_config.json"}


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="'<none>' is not in the vocabulary; set eos_token"):
        load_tokenizer(tokenizer_folder, eos_token="<none>")


def test_too_small_a_vocabulary_or_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 257"):
        train_byte_level_bpe(["text"], 256, tmp_path / "t")
    with pytest.raises(DataError, match="give only 2.. ids of 5000"):
        train_byte_level_bpe(["some text"], 5000, tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


@given(lengths=st.lists(st.integers(0, 6), max_size=12), dtype=st.sampled_from(["uint16", "int32"]))
def test_every_document_ends_in_eos(lengths: list[int], dtype: str) -> None:
    ids = np.arange(1, sum(lengths) + 1, dtype=np.uint32)
    pieces = np.split(ids, np.cumsum(lengths).astype(int)[:-1]) if lengths else []
    result, longer = join_documents(zip(pieces), 0, dtype)
    assert result.dtype == dtype
    assert result.tolist() == [token for part in pieces for token in [*part.tolist(), 0]]
    assert longer.tolist() == [length + 1 for length in lengths]


def test_a_prompt_and_its_response_are_one_document() -> None:
    pieces = [np.array([1, 2], np.uint32), np.array([3], np.uint32), np.array([], np.uint32)]
    ids, lengths = join_documents(zip(pieces, reversed(pieces), strict=True), 9, "uint16")
    assert ids.tolist() == [1, 2, 9, 3, 3, 9, 1, 2, 9] and lengths.tolist() == [3, 3, 3]
