import errno
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_kd.artefacts.manifest import MANIFEST_NAME
from megatron_kd.cli import main
from megatron_kd.config import from_mapping
from megatron_kd.data import corpus_encoder, indexed_dataset
from megatron_kd.data.batch import make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_dataset_writer import ChunkDatasetWriter
from megatron_kd.data.copy_chunks import copy_chunks
from megatron_kd.data.tokenization import LoadedTokenizer, load_tokenizer
from megatron_kd.data.tokenize_corpus import TokenizeCorpusConfig, run
from megatron_kd.data.tokenizer_engine import encode_by_library, join_documents
from megatron_kd.errors import ConfigError, DataError
from tests.unit.conftest import write_jsonl

HALF_HELDOUT = {"heldout_fraction": 0.5, "heldout_output": "x"}
TOOL = Path(__file__).parents[3] / "tools" / "tokenize_corpus.py"


def config(corpus: Path, tokenizer: Path, output: Path, **changes: object) -> TokenizeCorpusConfig:
    tree = {"input": str(corpus), "tokenizer": str(tokenizer), "output": str(output), "data": {"seq_length": 64}}
    return from_mapping(TokenizeCorpusConfig, {**tree, **changes}, "test")


def contents(dataset: ChunkDataset) -> list[list[int]]:
    return [dataset[index].tolist() for index in range(len(dataset))]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_packed_without_shuffle_is_the_corpus_cut(
    tmp_path: Path, corpus: Path, tokenizer: LoadedTokenizer, tokenizer_folder: Path, texts: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run(config(corpus, tokenizer_folder, tmp_path / "out", shuffle=False, flush_leftovers=True))
    stream, _ = join_documents(zip(encode_by_library(tokenizer.backend, texts)), 0, np.uint32)
    dataset = ChunkDataset.open(tmp_path / "out")
    expected = [stream[start : start + 65].tolist() for start in range(0, len(stream), 65)]
    assert contents(dataset) == expected
    assert dataset.manifest["producer"]["documents"] == len(texts)
    assert dataset.manifest["producer"]["corpus_tokens"] == dataset.num_tokens == len(stream)
    assert dataset.manifest["producer"]["engine_check"]["engine"] == "gigatoken"
    assert dataset.tokenizer_hash == tokenizer.info.hash
    assert dataset.token_byte_lengths.tolist() == tokenizer.info.token_byte_lengths.tolist()
    assert (dataset.tokenizer_path / "tokenizer.json").is_file()
    assert (
        dataset.token_byte_lengths[stream].sum() == sum(len(text.encode()) for text in texts) - 1
    )  # NFC: é, 3 bytes to 2
    assert capsys.readouterr().err.count("\n") == 1


def test_shuffle_keeps_the_chunks_and_changes_their_order(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    orders = []
    for name, changes in (("plain", {"shuffle": False}), ("s0", {}), ("s1", {"seed": 1})):
        run(config(corpus, tokenizer_folder, tmp_path / name, **changes))
        orders.append(contents(ChunkDataset.open(tmp_path / name)))
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("chunking", ["packed", "sentence_end"])
def test_workers_and_engine_change_no_byte(
    tmp_path: Path, tokenizer_folder: Path, texts: list[str], chunking: str
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts * 4)
    settings = {"chunking": chunking, "domain_field": "meta.set", "chunks_per_shard": 200}
    results = []
    for changes in ({"workers": 1}, {"workers": 2}, {"engine": "tokenizers"}):
        run(config(corpus, tokenizer_folder, tmp_path / "out", **settings, **changes))
        dataset = ChunkDataset.open(tmp_path / "out")
        assert len(dataset.shards) > 1
        results.append((dataset.fingerprint, {k: v for k, v in files_of(dataset.path).items() if k != MANIFEST_NAME}))
        shutil.rmtree(tmp_path / "out")
    assert results[0] == results[1] == results[2]


def test_the_split_is_by_document_and_disjoint(
    tmp_path: Path, tokenizer: LoadedTokenizer, tokenizer_folder: Path
) -> None:
    documents = [f"document number {number}." for number in range(600)] * 2
    corpus = write_jsonl(tmp_path / "corpus.jsonl", documents)
    settings = {"heldout_fraction": 0.2, "reference_fraction": 0.1, "shuffle": False, "flush_leftovers": True}
    outputs = {"heldout_output": str(tmp_path / "heldout"), "reference_output": str(tmp_path / "reference")}
    made = run(config(corpus, tokenizer_folder, tmp_path / "train", **settings, **outputs))
    assert set(made) == {"train", "heldout", "reference"}
    found = {}
    for role, path in made.items():
        dataset = ChunkDataset.open(path)
        text = tokenizer.backend.decode([i for chunk in contents(dataset) for i in chunk], skip_special_tokens=False)
        found[role] = text.split("<|endoftext|>")[:-1]
        assert dataset.manifest["producer"]["role"] == role
        assert dataset.manifest["producer"]["config"]["heldout_fraction"] == 0.2
    assert sorted(text for part in found.values() for text in part) == sorted(documents)
    sets = {role: set(part) for role, part in found.items()}
    assert sum(map(len, sets.values())) == 600  # both copies of a document are on the same side
    assert 85 < len(sets["heldout"]) < 155 and 35 < len(sets["reference"]) < 90


def test_what_is_already_made_is_kept_and_anything_else_refused(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"heldout_fraction": 0.3, "heldout_output": str(tmp_path / "heldout"), "flush_leftovers": True}
    run(config(corpus, tokenizer_folder, tmp_path / "out", **settings))
    before = files_of(tmp_path)
    run(config(corpus, tokenizer_folder, tmp_path / "out", **settings, workers=2))
    assert "already made" in capsys.readouterr().err
    assert files_of(tmp_path) == before
    with pytest.raises(DataError, match="already exists and is not this same artefact"):
        run(config(corpus, tokenizer_folder, tmp_path / "out", **settings, seed=1))
    shutil.rmtree(tmp_path / "out")  # one of two is made again, the same; the other is left alone
    stamp = (tmp_path / "heldout" / MANIFEST_NAME).stat().st_mtime_ns
    run(config(corpus, tokenizer_folder, tmp_path / "out", **settings))
    assert files_of(tmp_path) == before
    assert (tmp_path / "heldout" / MANIFEST_NAME).stat().st_mtime_ns == stamp
    made_from = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["producer"]["inputs"]
    changed_at = made_from[0]["mtime_ns"]
    assert made_from == [{"path": str(corpus), "bytes": corpus.stat().st_size, "mtime_ns": corpus.stat().st_mtime_ns}]
    for other in (changed_at + 5_000_000_000, changed_at - 1):  # written later, or moved here from elsewhere
        os.utime(corpus, ns=(other, other))
        with pytest.raises(DataError, match="made from an older .*corpus.jsonl"):
            run(config(corpus, tokenizer_folder, tmp_path / "out", **settings))


def test_bad_lines_go_to_quarantine_up_to_a_limit(
    tmp_path: Path, tokenizer_folder: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    good = corpus.read_bytes()
    corpus.write_bytes(b'{"text": 1}\n' + good + b"\xff\n")
    with pytest.raises(DataError, match=r"corpus.jsonl:1: field 'text' is int.*skip_bad_lines=true"):
        run(config(corpus, tokenizer_folder, tmp_path / "out"))
    with pytest.raises(DataError, match=r"corpus.jsonl:17: not UTF-8.*bad line 2, more than max_bad_lines=1"):
        run(config(corpus, tokenizer_folder, tmp_path / "out", skip_bad_lines=True, max_bad_lines=1))
    assert os.listdir(tmp_path) == ["corpus.jsonl"]
    run(config(corpus, tokenizer_folder, tmp_path / "out", skip_bad_lines=True, max_bad_lines=2))
    assert "2 bad lines skipped" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["path"], row["line"]) for row in rows] == [(str(corpus), 1), (str(corpus), len(texts) + 2)]
    assert rows[1]["reason"] == "not UTF-8 (byte 0xff at column 1)"
    ChunkDataset.open(tmp_path / "out").verify()


@pytest.mark.parametrize("changes", [
    {"chunking": "packed"},
    {"chunking": "sentence_end", "domain_field": "meta.set", "shuffle": False, "flush_leftovers": True},
])  # fmt: skip
def test_tasks_and_a_merge_give_what_one_run_gives(
    tmp_path: Path, tokenizer_folder: Path, texts: list[str], changes: dict[str, object],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whatever the number of tasks and their order; splits, shuffle, quarantine and manifest included."""
    monkeypatch.setattr(corpus_encoder, "PART_BYTES", 20_000)
    paths = [write_jsonl(tmp_path / f"corpus{number}.jsonl", texts[number:] * 2) for number in range(2)]
    paths[1].write_bytes(paths[1].read_bytes() + b"bad\n" + paths[0].read_bytes())
    settings = {
        "input": [str(path) for path in paths], "heldout_fraction": 0.3, "heldout_output": str(tmp_path / "heldout"),
        "skip_bad_lines": True, "chunks_per_shard": 100, **changes,
    }  # fmt: skip
    one = lambda **more: run(config(paths[0], tokenizer_folder, tmp_path / "out", **settings, **more))  # noqa: E731
    one()
    expected = [files_of(tmp_path / name) for name in ("out", "heldout")]
    bad_line = len(texts[1:]) * 2 + 1
    assert json.loads(expected[0]["quarantine.jsonl"])["line"] == bad_line
    for num_tasks in (1, 4):
        for name in ("out", "heldout"):
            shutil.rmtree(tmp_path / name)
        with pytest.raises(DataError, match="not encoded yet.*run the tasks that stopped again, then merge"):
            one(merge=True)
        for task in reversed(range(num_tasks)):
            one(num_tasks=num_tasks, task_index=task)
            assert not (tmp_path / "out").exists()
        with monkeypatch.context() as without:
            without.setattr(corpus_encoder, "_encode_documents", None)  # a merge encodes nothing
            one(merge=True)
        assert [files_of(tmp_path / name) for name in ("out", "heldout")] == expected
        assert not (tmp_path / "out.partial").exists()
    assert "merge them with merge=true" in capsys.readouterr().err
    with pytest.raises(DataError, match=rf"corpus1.jsonl:{bad_line}: not valid JSON"):  # the number in the file
        strict = {**settings, "skip_bad_lines": False, "heldout_output": str(tmp_path / "other")}
        for task in range(5):
            run(config(paths[0], tokenizer_folder, tmp_path / "o2", **strict, num_tasks=5, task_index=task))


def test_a_run_goes_on_with_the_parts_of_one_that_was_killed(
    tmp_path: Path, tokenizer_folder: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_encoder, "PART_BYTES", 20_000)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts * 3)
    run(config(corpus, tokenizer_folder, tmp_path / "out"))
    expected = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    program = f"""
from tests.unit.conftest import die_at_call
from megatron_kd.config import from_mapping
from megatron_kd.data import corpus_encoder, tokenize_corpus
corpus_encoder.PART_BYTES = 20_000
die_at_call(corpus_encoder, "_encode_documents", 9)
tokenize_corpus.run(from_mapping(tokenize_corpus.TokenizeCorpusConfig, {{
    "input": {str(corpus)!r}, "tokenizer": {str(tokenizer_folder)!r}, "output": {str(tmp_path / "out")!r},
    "data": {{"seq_length": 64}}}}, "test"))
"""
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    died = subprocess.run([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL, check=False)
    assert died.returncode == -signal.SIGKILL
    left = list((tmp_path / "out.partial").glob("*.part"))
    assert len(left) == 8 and not (tmp_path / "out").exists()
    encoded = []
    original = corpus_encoder._encode_documents
    monkeypatch.setattr(corpus_encoder, "_encode_documents", lambda *a: encoded.append(1) or original(*a))
    run(config(corpus, tokenizer_folder, tmp_path / "out"))
    assert files_of(tmp_path / "out") == expected
    assert len(encoded) == -(-corpus.stat().st_size // 20_000) - 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


def test_chunks_name_their_domain(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Every chunk's label is that of its documents, through sentence ends and shuffle."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [f"{'abc'[number % 3] * 3}zq. " * 300 for number in range(24)])
    run(config(corpus, tokenizer_folder, tmp_path / "out", domain_field="meta.set", chunking="sentence_end"))
    dataset = ChunkDataset.open(tmp_path / "out")
    backend = load_tokenizer(tokenizer_folder).backend
    assert sorted(dataset.domain_names) == ["a", "b", "c"] and dataset.domains is not None
    for index in range(len(dataset)):
        label = dataset.domain_names[dataset.domains[index]]
        assert set(backend.decode(contents(dataset)[index])) & set("abc") == {label}


def test_prompt_and_response(tmp_path: Path, tokenizer: LoadedTokenizer, tokenizer_folder: Path) -> None:
    """One chunk a row; the prompt's length is stored, losses leave it out, and selections keep it."""
    rows = [{"prompt": "Question? " * n, "response": " answer" * m} for n, m in [(1, 2), (3, 60), (40, 3), (0, 2)]]
    corpus = tmp_path / "pairs.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(config(corpus, tokenizer_folder, tmp_path / "out", chunking="prompt_response", shuffle=False))
    dataset = ChunkDataset.open(tmp_path / "out")
    encode = lambda text: tokenizer.backend.encode(text, add_special_tokens=False).ids  # noqa: E731
    pairs = [(encode(row["prompt"]), encode(row["response"])) for row in rows]
    kept = [pair for pair in pairs if len(pair[0]) < 65]
    assert len(kept) == 3 and any(len(one) + len(other) > 65 for one, other in kept)
    assert contents(dataset) == [[*prompt, *response, 0][:65] for prompt, response in kept]
    assert dataset.prompt_lengths is not None and dataset.manifest["producer"]["dropped_documents"] == 1
    assert dataset.prompt_lengths.tolist() == [len(prompt) for prompt, _ in kept]
    batch = make_batch(dataset, np.arange(3), 64)
    for row, (prompt, response) in enumerate(kept):
        counted = batch.labels[row][batch.loss_mask[row] > 0].tolist()
        expected = [*prompt, *response, 0][:65][max(len(prompt), 1) :]
        assert counted == expected
    writer_folder = tmp_path / "copy"
    writer_folder.mkdir()
    writer = ChunkDatasetWriter(writer_folder, dataset.tokenizer_info(), 64)
    copy_chunks(dataset, np.array([1, 2]), writer)
    writer.finish({"tool": "test"}, (), dataset.root_fingerprint, np.array([1, 2]))
    copy = ChunkDataset.open(writer_folder)
    assert (make_batch(copy, np.arange(2), 64).loss_mask == batch.loss_mask[1:]).all()


def test_a_split_by_chunk_is_disjoint_and_complete(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    settings = {"shuffle": False, "flush_leftovers": True}
    run(config(corpus, tokenizer_folder, tmp_path / "all", **settings))
    outputs = {"heldout_output": str(tmp_path / "heldout"), "reference_output": str(tmp_path / "reference")}
    fractions = {"heldout_fraction": 0.2, "reference_fraction": 0.3, "split_by": "chunk"}
    made = run(config(corpus, tokenizer_folder, tmp_path / "train", **settings, **outputs, **fractions))
    parts = {role: contents(ChunkDataset.open(path)) for role, path in made.items()}
    whole = contents(ChunkDataset.open(tmp_path / "all"))
    assert sorted(chunk for part in parts.values() for chunk in part) == sorted(whole)
    assert 0.1 < len(parts["heldout"]) / len(whole) < 0.3 < len(parts["train"]) / len(whole) < 0.7
    order = {tuple(chunk): number for number, chunk in enumerate(whole)}
    for part in parts.values():
        assert [order[tuple(chunk)] for chunk in part] == sorted(order[tuple(chunk)] for chunk in part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tasks": 3}, r"num_tasks=3 needs task_index .0 to 2., or merge=true"),
        ({"num_tasks": 3, "task_index": 3}, r"task_index must be 0 to 2 .num_tasks - 1., not 3"),
        ({"task_index": 0, "merge": True}, "exclude each other"),
        ({"document_separator": ""}, "document_separator must not be empty"),
        ({"data": {"seq_length": 0}}, "data.seq_length must be at least 1, not 0"),
        ({"heldout_fraction": 0.5}, "heldout_output .None. go together"),
        ({"reference_output": "x"}, "reference_fraction .0.0. and reference_output"),
        ({"heldout_fraction": 1.5, "heldout_output": "x"}, "below 1, not 1.5"),
        ({**HALF_HELDOUT, "reference_fraction": 0.5, "reference_output": "y"}, "leaves nothing"),
        ({"heldout_fraction": 0.5, "heldout_output": "/o/../o"}, "must differ"),
        ({"workers": -1}, "workers must not be negative, not -1"),
        ({"chunking": "sentences"}, "'chunking' must be one of packed, sentence_end"),
        ({"prepend_bos": True}, "prepend_bos=true needs chunking=sentence_end"),
        ({"data": {}}, "'data.seq_length' is required"),
        ({"chunk_per_shard": 3}, "did you mean 'chunks_per_shard'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(Path("c"), Path("t"), Path("/o"), **changes)


def spoiled(data: bytes) -> Callable[[Path], object]:
    """Replaces the corpus."""
    return lambda folder: (folder / "corpus.jsonl").write_bytes(data)


BAD_INPUTS = {
    "missing corpus": ([], lambda p: (p / "corpus.jsonl").unlink(), "no such file"),
    "empty corpus": ([], spoiled(b"\n"), "holds no document"),
    "malformed line": ([], spoiled(b'{"text": "a"}\n{"te'), "corpus.jsonl:2: not valid JSON"),
    "not UTF-8": ([], spoiled(b'{"text": "\xe9"}\n'), "corpus.jsonl:1: not UTF-8"),
    "truncated gzip": ([], spoiled(gzip.compress(b"x" * 999)[:-9]), "truncated gzip"),
    "no tokenizer": (["tokenizer=none"], None, "none: no such tokenizer"),
    "unknown key": (["txt_field=x"], None, "unknown key 'txt_field' (did you mean 'text_field'?)"),
    "too little text": (["data.seq_length=1000000"], None, "make no whole chunk"),
    "output exists": ([], lambda p: (p / "out").mkdir(), "already exists"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_line_and_status_2_and_leaves_nothing(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, case: str
) -> None:
    arguments, spoil, message = BAD_INPUTS[case]
    if spoil:
        spoil(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = tool(tmp_path, corpus, tokenizer_folder, arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("tokenize_corpus: ")
    assert message in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_size_limit_is_reported_as_a_full_disk(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    before = sorted(tmp_path.iterdir())
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    result = tool(tmp_path, corpus, tokenizer_folder, ["data.seq_length=64"], preexec_fn=limit)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert f"the disk is full while writing {tmp_path}/out" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("shuffle", ["true", "false"])
def test_a_disk_that_fills_at_any_write_leaves_nothing(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, shuffle: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Every flush to the disk in turn fails with ENOSPC, until one run needs no more of them."""
    before = sorted(tmp_path.iterdir())
    flush = os.fsync
    failed = 0
    while True:
        remaining = failed

        def full(descriptor: int) -> None:
            nonlocal remaining
            if remaining == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            remaining -= 1
            flush(descriptor)

        monkeypatch.setattr(indexed_dataset.os, "fsync", full)
        arguments = [f"input={corpus}", f"output={tmp_path}/out", f"tokenizer={tokenizer_folder}", f"shuffle={shuffle}"]
        with pytest.raises(SystemExit) as ended:
            main("tokenize_corpus", [*arguments, "data.seq_length=64"])
        if ended.value.code == 0:
            break
        assert ended.value.code == 2
        assert f"the disk is full while writing {tmp_path}/out" in capsys.readouterr().err
        if not (tmp_path / "out").exists():  # the very last flush, of the parent folder, comes after the rename
            assert sorted(tmp_path.iterdir()) == before
        else:
            ChunkDataset.open(tmp_path / "out").verify()
            break
        failed += 1
    assert failed >= 5
    ChunkDataset.open(tmp_path / "out").verify()


def start_tool(
    folder: Path, corpus: Path, tokenizer: Path, arguments: list[str], **keywords: object
) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOOL), f"input={corpus}", f"output={folder}/out", f"tokenizer={tokenizer}"]
    if not any(argument.startswith("data.seq_length") for argument in arguments):
        arguments = [*arguments, "data.seq_length=64"]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    return subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment,
        **keywords,
    )  # fmt: skip


def tool(
    folder: Path, corpus: Path, tokenizer: Path, arguments: list[str], **keywords: object
) -> subprocess.CompletedProcess[str]:
    process = start_tool(folder, corpus, tokenizer, arguments, **keywords)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def test_seq_length_bounds_every_chunk(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    settings = {"chunking": "sentence_end", "domain_field": "meta.set", "flush_leftovers": True}
    run(config(corpus, tokenizer_folder, tmp_path / "out", **settings))
    dataset = ChunkDataset.open(tmp_path / "out")
    assert 2 <= dataset.lengths.min() and dataset.lengths.max() <= 65
    assert len(np.unique(dataset.lengths)) > 10


@pytest.mark.parametrize("module", [
    "data.tokenize_corpus", "data.adopt_dataset", "data.convert_tokenization", "data.blend", "scoring.score_config",
    "selection.prediction_config", "selection.sample_by_difference", "selection.split_dataset",
])  # fmt: skip
def test_the_keys_of_the_corpus_tools_are_read_without_torch(module: str) -> None:
    code = f"import sys, megatron_kd.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TOOL.parents[1], check=False).returncode == 0
