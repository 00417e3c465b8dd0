"""Budgets, thresholds, strata, and what the report says, on a corpus with domains and a tokenizer."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts.artefact_folder import building
from megatron_kd.config import from_mapping
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.tokenization import LoadedTokenizer
from megatron_kd.errors import ConfigError, DataError
from megatron_kd.scoring.score_file import write_score_file
from megatron_kd.selection.sample_by_difference import SampleByDifferenceConfig, run

NAMES = ["Books3", "Pile-CC", "Git|Hub"]
CHUNKS = 60


@pytest.fixture
def corpus(tmp_path: Path, tokenizer: LoadedTokenizer, texts: list[str]) -> ChunkDataset:
    """Sixty chunks of real text, their domains, and scores whose difference is known."""
    ids = np.array(tokenizer.backend.encode(texts[0] + texts[1]).ids, dtype=np.int64)
    generator = np.random.default_rng(3)
    with (
        building(tmp_path / "dataset") as folder,
        closing(ChunkDatasetWriter(folder, tokenizer.info, 16, chunks_per_shard=25)) as writer,
    ):
        for index in range(CHUNKS):
            length = int(generator.integers(5, 17))
            writer.add(ids[16 * index : 16 * index + length], np.array([length]))
        writer.add_domains(NAMES, generator.integers(0, 3, CHUNKS))
        writer.finish({"tool": "test"})
    dataset = ChunkDataset.open(tmp_path / "dataset")
    teacher = generator.normal(2, 0.5, CHUNKS).astype(np.float32)
    for name, values in (("teacher", teacher), ("reference", teacher + differences())):
        model = {"fingerprint": name, "path": f"models/{name}"}
        write_score_file(tmp_path / name, values, dataset, model, "float32", {"tool": "test"})
    return dataset


def differences() -> np.ndarray:
    return (np.random.default_rng(9).permutation(CHUNKS) / 16 - 0.5).astype(np.float32)


def sample(folder: Path, **keys: object) -> ChunkDataset:
    tree = {"data": {"path": f"{folder}/dataset"}, "teacher_scores": f"{folder}/teacher",
            "reference_scores": f"{folder}/reference", "output": f"{folder}/out", **keys}  # fmt: skip
    return ChunkDataset.open(run(from_mapping(SampleByDifferenceConfig, tree, "test")))


def test_a_token_budget_is_used_up_from_the_top(tmp_path: Path, corpus: ChunkDataset) -> None:
    out = sample(tmp_path, token_budget=200)
    order = np.argsort(-differences(), kind="stable")
    fits = np.cumsum(corpus.lengths[order]) <= 200
    assert out.chunk_ids.tolist() == sorted(order[fits].tolist())
    assert out.num_tokens <= 200 < out.num_tokens + 17


def test_a_threshold_keeps_what_reaches_it(tmp_path: Path, corpus: ChunkDataset) -> None:
    out = sample(tmp_path, threshold=1.0)
    assert out.chunk_ids.tolist() == np.flatnonzero(differences() >= 0.999).tolist()
    with pytest.raises(DataError, match="threshold 100.0 keeps none of 60 chunks"):
        sample(tmp_path, threshold=100.0, output=f"{tmp_path}/none")


@pytest.mark.parametrize("rule", [{"ratio": 0.4}, {"token_budget": 300}])
def test_strata_keep_their_share(tmp_path: Path, corpus: ChunkDataset, rule: dict) -> None:
    out = sample(tmp_path, stratify_by_domain=True, **rule)
    domains, lengths = np.asarray(corpus.domains), corpus.lengths
    expected: list[int] = []
    for domain in range(3):
        members = np.flatnonzero(domains == domain)
        order = members[np.argsort(-differences()[members], kind="stable")]
        if "ratio" in rule:
            expected += order[: int(0.4 * len(members))].tolist()
        else:
            share = 300 * int(lengths[members].sum()) // corpus.num_tokens
            expected += order[np.cumsum(lengths[order]) <= share].tolist()
    assert out.chunk_ids.tolist() == sorted(expected)
    assert out.domain_names == NAMES and out.domains.tolist() == domains[sorted(expected)].tolist()


def test_the_report(tmp_path: Path, corpus: ChunkDataset) -> None:
    out = sample(tmp_path, ratio=0.25, examples=2)
    facts = json.loads((out.path / "selection.json").read_text())
    r = differences()
    assert facts["share_negative"] == pytest.approx((r < 0).mean()) and facts["kept"] == 15
    for row, name in zip(facts["domains"], NAMES, strict=True):
        mine = np.asarray(corpus.domains) == NAMES.index(name)
        kept = np.isin(np.flatnonzero(mine), out.chunk_ids).sum()
        assert (row["domain"], row["chunks"], row["kept"]) == (name, mine.sum(), kept)
        assert row["share"] == pytest.approx(kept / mine.sum())
        assert row["mean_r"] == pytest.approx(r[mine].mean(), abs=1e-4)
    text = (out.path / "selection.md").read_text()
    order = np.argsort(-r, kind="stable").tolist()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| top", "| middle", "| bottom"))]
    assert [int(row[1]) for row in rows if row[0] == "| top"] == order[:2]
    assert [int(row[1]) for row in rows if row[0] == "| bottom"] == order[:-3:-1]
    assert {int(row[1]) for row in rows if row[0] == "| middle"} == set(order[29:31])
    teacher = np.load(tmp_path / "teacher" / "scores.npy")
    first = rows[0]
    assert first[2] == f"{teacher[order[0]]:.2f}" and first[4] == f"{r[order[0]]:.2f}" and first[5] == "yes"
    decoded = corpus[order[0]].tolist()
    assert len(first[6]) > 5 and len(decoded) > 0 and rows[-1][5] == "no"
    assert "Git\\|Hub" in text and "teacher: models/teacher" in text
    out.verify()


def test_a_reference_model_that_has_seen_the_corpus(tmp_path: Path, corpus: ChunkDataset) -> None:
    seen = np.load(tmp_path / "reference" / "scores.npy")
    model = {"fingerprint": "leaky", "trained_on": corpus.fingerprint, "trained_on_path": str(corpus.path)}
    write_score_file(tmp_path / "leaky", seen, corpus, model, "float32", {"tool": "test"})
    with pytest.raises(DataError, match="the reference model was trained on 60 of the 60 chunks"):
        sample(tmp_path, reference_scores=f"{tmp_path}/leaky")
    assert not (tmp_path / "out").exists()
    sample(tmp_path, reference_scores=f"{tmp_path}/leaky", force=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ratio": 0.5, "threshold": 1.0}, "ratio and threshold exclude each other"),
        ({"token_budget": 0}, "token_budget must be at least 1"),
        ({"threshold": 1.0, "stratify_by_domain": True}, "stratify_by_domain needs ratio or token_budget"),
        ({"examples": -1}, "examples must not be negative"),
        ({"teacher_scores": None}, "give teacher_scores and reference_scores, or"),
        ({"predicted_difference": "p"}, "give teacher_scores and reference_scores, or"),
    ],
)
def test_settings_that_exclude_each_other(tmp_path: Path, keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(tmp_path, **keys)


def test_strata_without_domains_are_refused(tmp_path: Path, corpus: ChunkDataset, tokenizer: LoadedTokenizer) -> None:
    with building(tmp_path / "plain") as folder:
        writer = ChunkDatasetWriter(folder, tokenizer.info, 16)
        for index in range(CHUNKS):
            writer.add(corpus[index], corpus.lengths[index : index + 1])
        writer.finish({"tool": "test"})
    plain = ChunkDataset.open(tmp_path / "plain")
    for name in ("teacher", "reference"):
        scores = np.load(tmp_path / name / "scores.npy")
        write_score_file(tmp_path / f"p{name}", scores, plain, {"fingerprint": name}, "float32", {"tool": "test"})
    with pytest.raises(DataError, match="its chunks name no domain"):
        sample(tmp_path, data={"path": f"{tmp_path}/plain"}, teacher_scores=f"{tmp_path}/pteacher",
               reference_scores=f"{tmp_path}/preference", stratify_by_domain=True)  # fmt: skip
