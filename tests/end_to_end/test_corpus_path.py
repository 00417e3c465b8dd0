"""The corpus path on a small stand-in for the Pile: real text under its 17 domain labels, every step by its command.

tokenize_corpus → train (teacher, reference) → score_corpus twice → sample_by_difference → convert, inspect
"""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.tokenization import train_byte_level_bpe
from tests.end_to_end.commands import run

DOMAINS = (
    "Pile-CC", "PubMed Central", "Books3", "OpenWebText2", "ArXiv", "Github", "FreeLaw", "StackExchange",
    "USPTO Backgrounds", "PubMed Abstracts", "Gutenberg (PG-19)", "OpenSubtitles", "Wikipedia (en)", "DM Mathematics",
    "Ubuntu IRC", "HackerNews", "Enron Emails",
)  # fmt: skip
DOCUMENT_CHARACTERS = 1500


def python_sources() -> list[str]:
    """Files of the standard library and its packages: text that every machine that runs the tests has."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text("utf-8", "ignore") for path in sorted(folder.glob("*.py"))[:60]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL as the Pile has it: ``text`` and ``meta.pile_set_name``; a module's pieces share a label."""
    folder = tmp_path_factory.mktemp("pile")
    sources = python_sources()
    with open(folder / "pile.jsonl", "w", encoding="utf-8") as file:
        for number, source in enumerate(sources):
            for start in range(0, min(len(source), 3 * DOCUMENT_CHARACTERS), DOCUMENT_CHARACTERS):
                row = {"text": source[start : start + DOCUMENT_CHARACTERS],
                       "meta": {"pile_set_name": DOMAINS[number % len(DOMAINS)]}}  # fmt: skip
                file.write(json.dumps(row) + "\n")
    train_byte_level_bpe(sources[:20], 400, folder / "tokenizer")
    train_byte_level_bpe(sources[30:50], 350, folder / "other_tokenizer")
    return folder


def succeed(verb: str, *arguments: str) -> str:
    ended = run(verb, *arguments, timeout=400)
    assert ended.status == 0, f"{verb}: {ended.stderr[-2000:]}"
    return ended.stdout


@pytest.mark.slow
def test_from_text_to_a_sampled_dataset(corpus: Path) -> None:
    succeed(
        "tokenize_corpus", f"input={corpus}/pile.jsonl", f"tokenizer={corpus}/tokenizer", f"output={corpus}/train",
        "data.seq_length=64", "chunking=sentence_end", "domain_field=meta.pile_set_name", "reference_fraction=0.2",
        f"reference_output={corpus}/reference", "workers=1", "flush_leftovers=true",
    )  # fmt: skip
    dataset = ChunkDataset.open(corpus / "train")
    assert sorted(dataset.domain_names) == sorted(DOMAINS) and len(dataset) > 500
    small = ["training.global_batch_size=8", "training.micro_batch_size=8", "optimizer.lr=5e-3"]
    for role, data, model, steps in (("teacher", "train", "qwen_toy_teacher", 40),
                                     ("reference", "reference", "qwen_toy_reference", 10)):  # fmt: skip
        succeed("train", f"data.path={corpus}/{data}", f"output={corpus}/run-{role}", f"model.name={model}",
                f"training.train_iters={steps}", *small)  # fmt: skip
        succeed("score_corpus", f"data.path={corpus}/train", f"model.path={corpus}/run-{role}",
                f"output={corpus}/scores-{role}")  # fmt: skip
    check_hugging_face_scores(corpus)
    scores = [f"teacher_scores={corpus}/scores-teacher", f"reference_scores={corpus}/scores-reference"]
    succeed("sample_by_difference", f"data.path={corpus}/train", *scores, "ratio=0.5", f"output={corpus}/sampled")
    check_sample(corpus, dataset)
    stratified = ["stratify_by_domain=true", f"output={corpus}/stratified"]
    succeed("sample_by_difference", f"data.path={corpus}/train", *scores, *stratified)
    for row in json.loads((corpus / "stratified" / "selection.json").read_text())["domains"]:
        assert row["kept"] == row["chunks"] // 2
    own_data = run("score_corpus", f"data.path={corpus}/reference", f"model.path={corpus}/run-reference",
                   f"output={corpus}/refused")  # fmt: skip
    assert own_data.status == 2 and "the reference split that" in own_data.lines[-1]
    succeed("convert_tokenization", f"data.path={corpus}/sampled", f"tokenizer={corpus}/other_tokenizer",
            f"output={corpus}/converted", "seq_length=96", "workers=1")  # fmt: skip
    assert len(ChunkDataset.open(corpus / "converted")) == len(dataset) // 2
    for name, words in (("sampled", "score file (reference)"), ("scores-teacher", "nats per token"),
                        ("converted", "chunk dataset")):  # fmt: skip
        text = succeed("inspect_dataset", f"path={corpus}/{name}", "verify=true")
        assert words in text and "every checksum agrees" in text


def check_sample(corpus: Path, dataset: ChunkDataset) -> None:
    teacher, reference = (np.load(corpus / f"scores-{role}" / "scores.npy") for role in ("teacher", "reference"))
    difference = reference - teacher
    expected = np.sort(np.argsort(-np.nan_to_num(difference, nan=-np.inf), kind="stable")[: len(dataset) // 2])
    sampled = ChunkDataset.open(corpus / "sampled")
    assert sampled.chunk_ids.tolist() == expected.tolist()
    assert np.nanmean(difference) > 0.1, "the teacher has learnt more than the reference model"
    text = (corpus / "sampled" / "selection.md").read_text()
    assert all(name in text for name in DOMAINS) and text.count("| top |") == 3


def check_hugging_face_scores(corpus: Path) -> None:
    """The exported teacher, scored from its Hugging Face folder, gives the checkpoint's scores."""
    succeed("convert_to_hf", f"input={corpus}/run-teacher", f"output={corpus}/hf", "verify=false")
    succeed("score_corpus", f"data.path={corpus}/train", f"model.path={corpus}/hf", f"output={corpus}/scores-hf")
    theirs, ours = (np.load(corpus / f"scores-{name}" / "scores.npy") for name in ("hf", "teacher"))
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
