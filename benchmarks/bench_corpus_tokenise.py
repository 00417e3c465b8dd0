"""Tokenise + chunk + write, JSONL in to ``.bin/.idx`` out, beside gigatoken's bare encoder and MiniPLM's method.

The corpus: the sources of the Python standard library and of the packages installed here, one file a document, in
three domains, 1 GiB, repeated where they are less (``--quick``: 24 MB: mostly start-up). The tokenizer: a byte-level
BPE of 32,000 ids (``--quick``: 8,000) trained on a part of it. Sides, alternating, each a process with two cores:

* ``bare``: ``gigatoken.Tokenizer.encode_files(JsonlFileSource)``; nothing is chunked or written; the call is timed.
* ``packed``, ``sentence_end``, ``shuffled`` (packed): ``tokenize_corpus`` with 2 workers, timed from ``run`` on,
  worker processes' start included; peak memory is the sum over its processes, shared pages counted once.
* ``miniplm``: the method of the released ``tokenize_pile``, written out again: Hugging Face's tokenizer in 2 worker
  processes, documents one by one through a pool, buffers and sentence ends in Python, on the first 1/20 of the corpus.

``python benchmarks/bench_corpus_tokenise.py SIDE FOLDER`` is one side.
"""

import json
import os
import resource
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
CORES = 2
SEQ_LENGTH = 1024
OURS: dict[str, dict[str, Any]] = {
    "packed": {"shuffle": False},
    "sentence_end": {"shuffle": False, "chunking": "sentence_end", "domain_field": "set"},
    "shuffled": {"shuffle": True},
}


def measure(quick: bool, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield one row for each side."""
    make_corpus(folder, (24 if quick else 1024) << 20, 8_000 if quick else 32_000)
    sides = ["bare", *OURS]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(1 if quick else 3):
        for side in sides if number % 2 == 0 else reversed(sides):
            runs[side].append(run_side(side, folder))
    miniplm = run_side("miniplm", folder)
    bare = [run["megabytes_per_second"] for run in runs["bare"]]
    bare_cpu = median([run["cpu_seconds"] for run in runs["bare"]])
    for side in sides:
        rates = [run["megabytes_per_second"] for run in runs[side]]
        row = {
            "side": side,
            "megabytes": runs[side][0]["megabytes"],
            "megabytes_per_second": median(rates),
            "of_bare": median([rate / other for rate, other in zip(rates, bare, strict=True)]),
            "times_miniplm": median(rates) / miniplm["megabytes_per_second"],
            "cpu_of_bare": bare_cpu / median([run["cpu_seconds"] for run in runs[side]]),
            "peak_memory_mib": max(run.get("peak_memory_mib", 0) for run in runs[side]),
            "runs": runs[side],
        }
        yield row
    yield {"side": "miniplm", **miniplm}


def describe(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    line = f"{row['side']:<13}{row['megabytes_per_second']:>8.1f} MB/s"
    if "of_bare" in row:
        line += f"{row['of_bare']:>5.0%} of gigatoken alone ({row['cpu_of_bare']:.0%} by CPU time)"
        line += f"{row['times_miniplm']:>7.1f} x MiniPLM's method"
    return line + (f"  {row['peak_memory_mib']:,.0f} MiB" if row.get("peak_memory_mib") else "")


def median(values: list[float]) -> float:
    """Return the middle value."""
    return sorted(values)[len(values) // 2]


def make_corpus(folder: Path, size: int, vocab_size: int) -> None:
    """Write ``corpus.jsonl``, ``part.jsonl`` (its first 1/20) and ``tokenizer/`` into ``folder``."""
    from megatron_kd.data.tokenization import train_byte_level_bpe

    paths = sysconfig.get_paths()
    files = [path for root in ("stdlib", "purelib") for path in sorted(Path(paths[root]).rglob("*.py"))]
    sample, written, part = [], 0, 0
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as out:
        while written < size:
            for number, path in enumerate(files):
                try:
                    text = path.read_text("utf-8")
                except (UnicodeDecodeError, OSError):
                    continue
                if number % 16 == 0 and len(sample) < 1500:
                    sample.append(text)
                written += out.write(json.dumps({"text": text, "set": "abc"[number % 3]}) + "\n")
                if written >= size // 20 and not part:
                    part = written
                if written >= size:
                    break
    with open(folder / "corpus.jsonl", "rb") as source, open(folder / "part.jsonl", "wb") as out:
        out.write(source.read(part))
    train_byte_level_bpe(sample, vocab_size, folder / "tokenizer")


def run_side(side: str, folder: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    import psutil

    environment = {**os.environ, "OMP_NUM_THREADS": str(CORES), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, __file__, side, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        root = psutil.Process(process.pid)
        while not ended.wait(0.2):
            try:
                family = [root, *root.children(recursive=True)]
                peak[0] = max(peak[0], sum(one.memory_full_info().pss for one in family) / 2**20)
            except psutil.Error:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{side} ended with status {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "peak_memory_mib": peak[0]}


def bare_side(folder: Path) -> dict[str, Any]:
    """Encode the file with gigatoken alone, to memory."""
    import gigatoken

    tokenizer = gigatoken.Tokenizer(str(folder / "tokenizer" / "tokenizer.json"))
    path = folder / "corpus.jsonl"
    started, before = time.perf_counter(), cpu_seconds()
    tokenizer.encode_files(gigatoken.JsonlFileSource([str(path)], field="text"))
    return rate(path, time.perf_counter() - started) | {"cpu_seconds": cpu_seconds() - before}


def our_side(side: str, folder: Path) -> dict[str, Any]:
    """Run ``tokenize_corpus``, and remove the dataset."""
    import shutil

    from megatron_kd.config import from_mapping
    from megatron_kd.data.tokenize_corpus import TokenizeCorpusConfig, run

    path, output = folder / "corpus.jsonl", folder / "out"
    tree = {
        "input": str(path), "tokenizer": str(folder / "tokenizer"), "output": str(output), "workers": CORES,
        "data": {"seq_length": SEQ_LENGTH}, **OURS[side],
    }  # fmt: skip
    config = from_mapping(TokenizeCorpusConfig, tree, "benchmark")
    started, before = time.perf_counter(), cpu_seconds()
    run(config)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - before
    shutil.rmtree(output)
    return rate(path, seconds) | {"cpu_seconds": cpu}


def cpu_seconds() -> float:
    """Return the CPU time of this process and its ended children; steadier than wall time on a shared machine."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def rate(path: Path, seconds: float) -> dict[str, Any]:
    """Return the bytes of the JSONL file over seconds."""
    megabytes = path.stat().st_size / 1e6
    return {"megabytes": megabytes, "seconds": seconds, "megabytes_per_second": megabytes / seconds}


_worker_tokenizer: Any = None


def _start_miniplm_worker(folder: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    _worker_tokenizer = AutoTokenizer.from_pretrained(folder)


def _miniplm_encode(line: str) -> tuple[list[int], str]:
    row = json.loads(line)
    return _worker_tokenizer.encode(row["text"], add_special_tokens=False) + [_worker_tokenizer.eos_token_id], row[
        "set"
    ]


def _miniplm_sentence_ends(texts: list[str]) -> set[int]:
    pairs = (("[", "]"), ("(", ")"), ("\\", "{"), ("<", ">"))
    return {
        index for index, text in enumerate(texts)
        if any(mark in text for mark in ".!?;\n") and not any(one in text and other not in text for one, other in pairs)
    }  # fmt: skip


def miniplm_side(folder: Path) -> dict[str, Any]:
    """Tokenise with Hugging Face's tokenizer in a pool of 2, one buffer for each domain, sentence ends in Python."""
    import multiprocessing

    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts = [tokenizer.decode([index]) for index in range(len(tokenizer))]
    end_sent = _miniplm_sentence_ends(texts) | {tokenizer.eos_token_id}
    path, length = folder / "part.jsonl", SEQ_LENGTH + 1
    buffers: dict[str, list[int]] = {}
    lengths: list[int] = []
    with (
        multiprocessing.get_context("spawn").Pool(CORES, _start_miniplm_worker, (str(folder / "tokenizer"),)) as pool,
        open(path, encoding="utf-8") as lines,
        open(folder / "miniplm.bin", "wb") as out,
    ):
        pool.map(_miniplm_encode, ['{"text": "ready", "set": "a"}'] * 64, 1)  # the workers have started
        started = time.perf_counter()
        for ids, domain in pool.imap_unordered(_miniplm_encode, lines, 32):
            buffer = buffers.setdefault(domain, [])
            buffer.extend(ids)
            while len(buffer) >= length:
                chunk, rest = buffer[:length], buffer[length:]
                for place in range(length - 1, -1, -1):
                    if chunk[place] in end_sent and (
                        chunk[place] == tokenizer.eos_token_id
                        or "\n" in texts[chunk[place]]
                        or " " in tokenizer.decode((chunk + rest[:1])[place : place + 2])
                    ):
                        chunk, rest = chunk[: place + 1], chunk[place + 1 :] + rest
                        break
                buffer[:] = rest
                if len(chunk) > 1:
                    out.write(np.array(chunk, dtype=np.uint16).tobytes())
                    lengths.append(len(chunk))
    np.array(lengths, dtype=np.int32).tofile(folder / "miniplm.idx")
    return rate(path, time.perf_counter() - started)


def main() -> None:
    """Run one side, and print its figures as JSON on the last line."""
    side, folder = sys.argv[1], Path(sys.argv[2])
    result = (
        bare_side(folder) if side == "bare" else miniplm_side(folder) if side == "miniplm" else our_side(side, folder)
    )
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
