"""``tokenize_corpus``: raw text to chunk datasets.

    python tools/tokenize_corpus.py --config FILE [input=… output=… tokenizer=… data.seq_length=…]

    files → units → parts: documents as ids + eos, on disk → split → chunks → shuffle → shards + manifest

Memory is bounded whatever the size of the corpus. A run that was killed resumes with the parts that it had encoded.
Several processes can share the encoding; then one merges their parts, which moves ids and encodes nothing:

    python tools/tokenize_corpus.py --config FILE num_tasks=8 task_index=$SLURM_ARRAY_TASK_ID      (8 of them)
    python tools/tokenize_corpus.py --config FILE merge=true

The datasets do not depend on the number of tasks or workers.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_kd.artefacts.manifest import already_made, recipe_of
from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.config import to_mapping
from megatron_kd.data.chunk_dataset import KIND, ChunkDataset
from megatron_kd.data.chunk_dataset_writer import DEFAULT_CHUNKS_PER_SHARD
from megatron_kd.data.corpus_encoder import EncodingJob, encode_corpus, read_parts, units_of
from megatron_kd.data.corpus_files import BadLine, DocumentFormat, FormatName, expand_inputs, lines_before
from megatron_kd.data.corpus_outputs import ROLES, Chunking, CorpusOutputs, OutputSettings, SplitBy
from megatron_kd.data.document_formats import read_blocks
from megatron_kd.data.encoded_parts import EncodedBlock, EncodedParts, Unit
from megatron_kd.data.indexed_dataset import dtype_for_vocab
from megatron_kd.data.tokenization import LoadedTokenizer, load_tokenizer
from megatron_kd.data.tokenizer_engine import SAMPLE_BYTES, Engine, EngineCheck, choose_engine
from megatron_kd.data.workers import cpu_count
from megatron_kd.errors import DataError
from megatron_kd.logs import progress_bar

logger = logging.getLogger(__name__)

SMALL_CORPUS_BYTES = 64 << 20
_COMPRESSION_GUESS = 4
_SAMPLE_FILES = 16
_HOW_IT_RUNS: dict[str, Any] = {"workers": 0, "num_tasks": 1, "task_index": None, "merge": False}


@dataclass(frozen=True)
class ChunkLengthConfig:
    """``data.*`` keys of ``tokenize_corpus``: ``seq_length``, positions per training row; a chunk has one id more."""

    seq_length: int

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        if self.seq_length < 1:
            yield f"data.seq_length must be at least 1, not {self.seq_length}"


@dataclass(frozen=True)
class TokenizeCorpusConfig:
    """Keys of ``tokenize_corpus``; ``docs/file_formats.md`` explains them."""

    input: tuple[str, ...]
    output: str
    tokenizer: str
    data: ChunkLengthConfig
    input_format: FormatName = "auto"
    text_field: str = "text"
    domain_field: str | None = None
    prompt_field: str = "prompt"
    response_field: str = "response"
    document_separator: str | None = None
    chunking: Chunking = "packed"
    flush_leftovers: bool = False
    prepend_bos: bool = False
    eos_token: str | None = None
    shuffle: bool = True
    seed: int = 0
    workers: int = 0
    engine: Engine = "auto"
    skip_bad_lines: bool = False
    max_bad_lines: int = 1000
    heldout_fraction: float = 0.0
    heldout_output: str | None = None
    reference_fraction: float = 0.0
    reference_output: str | None = None
    split_by: SplitBy = "document"
    num_tasks: int = 1
    task_index: int | None = None
    merge: bool = False
    chunks_per_shard: int = DEFAULT_CHUNKS_PER_SHARD

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        for role in ("heldout", "reference"):
            fraction, output = getattr(self, f"{role}_fraction"), getattr(self, f"{role}_output")
            if not 0 <= fraction < 1:
                yield f"{role}_fraction must be at least 0 and below 1, not {fraction}"
            if (fraction > 0) != (output is not None):
                yield f"{role}_fraction ({fraction}) and {role}_output ({output}) go together: give both or neither"
        if self.heldout_fraction + self.reference_fraction >= 1:
            total = self.heldout_fraction + self.reference_fraction
            yield f"heldout_fraction + reference_fraction = {total} leaves nothing to train on; lower them"
        outputs = [os.path.abspath(path) for path in (self.output, self.heldout_output, self.reference_output) if path]
        if len(set(outputs)) < len(outputs):
            yield f"output, heldout_output and reference_output must differ: {', '.join(outputs)}"
        if not self.input:
            yield "input names no file; give files or globs"
        for key in ("workers", "max_bad_lines"):
            if getattr(self, key) < 0:
                yield f"{key} must not be negative, not {getattr(self, key)}"
        if self.chunks_per_shard < 1:
            yield f"chunks_per_shard must be at least 1, not {self.chunks_per_shard}"
        if self.prepend_bos and self.chunking != "sentence_end":
            yield "prepend_bos=true needs chunking=sentence_end"
        if self.document_separator == "":
            yield "document_separator must not be empty"
        yield from self._validate_tasks()

    def _validate_tasks(self) -> Iterator[str]:
        if self.num_tasks < 1:
            yield f"num_tasks must be at least 1, not {self.num_tasks}"
        elif self.task_index is None and self.num_tasks > 1 and not self.merge:
            yield f"num_tasks={self.num_tasks} needs task_index (0 to {self.num_tasks - 1}), or merge=true at the end"
        elif self.task_index is not None and self.merge:
            yield "merge=true and task_index exclude each other: merge once, after all tasks"
        elif self.task_index is not None and not 0 <= self.task_index < self.num_tasks:
            yield f"task_index must be 0 to {self.num_tasks - 1} (num_tasks - 1), not {self.task_index}"

    @property
    def form(self) -> DocumentFormat:
        """Where the documents are in the files."""
        is_pair = self.chunking == "prompt_response"
        return DocumentFormat(
            self.input_format,
            self.prompt_field if is_pair else self.text_field,
            self.domain_field,
            self.response_field if is_pair else None,
            self.document_separator,
        )

    @property
    def outputs(self) -> dict[str, str]:
        """Role → path of every dataset to make."""
        paths = (self.output, self.heldout_output, self.reference_output)
        return {role: path for role, path in zip(ROLES, paths, strict=True) if path}

    @property
    def split_seed(self) -> int | None:
        """Seed of the documents' split hashes; None if nothing is split by document."""
        return self.seed if len(self.outputs) > 1 and self.split_by == "document" else None


@dataclass
class Counts:
    """Running totals of a corpus."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    bad: list[BadLine] = field(default_factory=list)
    lines: dict[tuple[str, int], int] = field(default_factory=dict)
    """Lines counted so far of each (file, first byte of the unit)."""

    def add(self, block: EncodedBlock, config: TokenizeCorpusConfig) -> None:
        """Count a block.

        Raises:
            DataError: there is a bad line that is not to be skipped, or one too many.
        """
        unit = (block.path, block.unit_start)
        before = self.lines.get(unit, 0)
        self.lines[unit] = before + block.num_lines
        if block.bad:
            before += lines_before(block.path, block.unit_start)
        self.documents += len(block.lengths)
        self.text_bytes += block.text_bytes
        self.tokens += len(block.ids)
        self.bad.extend(BadLine(line.path, before + line.line, line.reason) for line in block.bad)
        if self.bad and not config.skip_bad_lines:
            raise DataError(f"{self.bad[0]}; fix the line, or skip such lines with skip_bad_lines=true")
        if len(self.bad) > config.max_bad_lines:
            raise DataError(
                f"{self.bad[config.max_bad_lines]}; that is bad line {config.max_bad_lines + 1}, more than "
                f"max_bad_lines={config.max_bad_lines}: fix the lines, or raise it"
            )


def run(config: TokenizeCorpusConfig) -> dict[str, str]:
    """Tokenise a corpus, and return role (``train``, ``heldout``, ``reference``) → path of each dataset made.

    Raises:
        DataError: the corpus is missing, empty or malformed, or the tokenizer is; an output exists and is something
            else; there is unfinished work of other settings.
    """
    paths = expand_inputs(config.input)
    tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    recipe = _recipe(config, paths, tokenizer)
    to_make = {role: path for role, path in config.outputs.items() if not _is_made(path, f"{recipe}-{role}", paths)}
    if not to_make:
        shutil.rmtree(f"{config.output}.partial", ignore_errors=True)
        logger.info(f"{', '.join(config.outputs.values())}: already made from this input with these settings")
        return config.outputs
    check = choose_engine(tokenizer, _sample(config, paths), config.engine)
    parts = EncodedParts(WorkStore(config.output, _parts_recipe(config, paths, tokenizer, check)))
    units = units_of(paths, config.form)
    job = _job(config, tokenizer, check)
    with parts.opened(shared=config.task_index is not None, keep=config.merge):
        if config.task_index is not None:
            _encode_share(config, units, job, parts)
            return {}
        _make_outputs(config, paths, tokenizer, check, units, job, parts, to_make, recipe)
        parts.store.remove()
    return config.outputs


def _encode_share(config: TokenizeCorpusConfig, units: list[Unit], job: EncodingJob, parts: EncodedParts) -> None:
    share = units[config.task_index :: config.num_tasks]
    counts = Counts()
    total = _bytes_of(share)
    with progress_bar(total, "encode") as bar:
        for block in encode_corpus(share, job, parts, _num_workers(config.workers, total)):
            counts.add(block, config)
            bar.update(block.raw_bytes)
    done = sum(parts.finished(unit).is_complete for unit in units)
    logger.info(
        f"task {config.task_index} of {config.num_tasks}: {counts.documents} documents, {counts.tokens} tokens; "
        f"{done} of {len(units)} units are done" + ("; merge them with merge=true" if done == len(units) else "")
    )


def _make_outputs(
    config: TokenizeCorpusConfig,
    paths: list[str],
    tokenizer: LoadedTokenizer,
    check: EngineCheck,
    units: list[Unit],
    job: EncodingJob,
    parts: EncodedParts,
    to_make: dict[str, str],
    recipe: str,
) -> None:
    """Encode what is not encoded yet (with ``merge``, nothing), chunk everything and write the datasets."""
    counts = Counts()
    inputs = _described(paths)
    total = _bytes_of(units)
    with CorpusOutputs(_output_settings(config), to_make, tokenizer, _expected_bytes(paths)).opened() as outputs:
        if config.merge:
            blocks = read_parts(units, parts)
        else:
            blocks = encode_corpus(units, job, parts, _num_workers(config.workers, total))
        with progress_bar(total, "tokenize") as bar:
            for block in blocks:
                counts.add(block, config)
                outputs.add(block)
                bar.update(block.raw_bytes)
        if not counts.documents:
            raise DataError(f"{', '.join(config.input)}: the corpus holds no document; check 'input' and 'text_field'")
        bad = [{"path": line.path, "line": line.line, "reason": line.reason} for line in counts.bad]
        summaries = outputs.finish(_producer(config, inputs, check, counts), bad, recipe)
    skipped = f", {len(counts.bad)} bad lines skipped" if counts.bad else ""
    kept = [f"{path} was already made" for role, path in config.outputs.items() if role not in to_make]
    logger.info(
        f"{counts.documents} documents, {counts.tokens} tokens from {len(paths)} files ({check.engine}{skipped}): "
        + "; ".join([*summaries, *kept])
    )


def _job(config: TokenizeCorpusConfig, tokenizer: LoadedTokenizer, check: EngineCheck) -> EncodingJob:
    dtype = dtype_for_vocab(tokenizer.info.vocab_size).name
    return EncodingJob(config.tokenizer, config.eos_token, check.engine, config.form, dtype, config.split_seed)


def _output_settings(config: TokenizeCorpusConfig) -> OutputSettings:
    return OutputSettings(
        config.data.seq_length, config.chunking, config.prepend_bos, config.flush_leftovers, config.shuffle,
        config.seed, config.chunks_per_shard, config.split_by, config.heldout_fraction, config.reference_fraction,
        config.outputs,
    )  # fmt: skip


def _parts_recipe(
    config: TokenizeCorpusConfig, paths: list[str], tokenizer: LoadedTokenizer, check: EngineCheck
) -> dict[str, Any]:
    """Return what the encoded documents depend on."""
    inputs = [[path, os.path.getsize(path), os.stat(path).st_mtime_ns] for path in paths]
    form = to_mapping(config.form)
    return {
        "inputs": f"{len(paths)} files {recipe_of({'paths, sizes and times': inputs})}",
        "form": form,
        "split_seed": config.split_seed,
        "tokenizer": tokenizer.info.hash,
        "engine": check.engine,
    }


def _recipe(config: TokenizeCorpusConfig, paths: list[str], tokenizer: LoadedTokenizer) -> str:
    irrelevant = {"output", "heldout_output", "reference_output", "engine", "tokenizer", "input", *_HOW_IT_RUNS}
    settings = {key: value for key, value in to_mapping(config).items() if key not in irrelevant}
    inputs = [[path, os.path.getsize(path)] for path in paths]
    return recipe_of(
        {"tool": "tokenize_corpus", "settings": settings, "inputs": inputs, "tokenizer": tokenizer.info.hash}
    )


def _is_made(output: str, recipe: str, paths: list[str]) -> bool:
    if not already_made(output, KIND, recipe):
        return False
    made_from = ChunkDataset.open(output).manifest["producer"]["inputs"]
    changed = [path for path, before in zip(paths, made_from) if before.get("mtime_ns") != os.stat(path).st_mtime_ns]
    if changed:
        raise DataError(
            f"{output}: already exists, made from an older {changed[0]} (of the same size, but another modification "
            "time); remove it to make it again"
        )
    return True


def _sample(config: TokenizeCorpusConfig, paths: list[str]) -> list[str]:
    """Return documents from the start of up to 16 files, evenly chosen, about ``SAMPLE_BYTES`` in all."""
    chosen = [paths[index] for index in sorted({i * len(paths) // _SAMPLE_FILES for i in range(_SAMPLE_FILES)})]
    texts: list[str] = []
    for path in chosen:
        room = SAMPLE_BYTES // len(chosen)
        block = next(read_blocks(path, config.form, block_bytes=2 * room), None)
        for text in block.load().parse(config.form).texts if block else []:
            texts.append(text)
            room -= len(text)
            if room <= 0:
                break
    return texts


def _described(paths: list[str]) -> list[dict[str, Any]]:
    """Return the input files as the manifest records them."""
    return [{"path": path, "bytes": os.path.getsize(path), "mtime_ns": os.stat(path).st_mtime_ns} for path in paths]


def _producer(
    config: TokenizeCorpusConfig, inputs: list[dict[str, Any]], check: EngineCheck, counts: Counts
) -> dict[str, Any]:
    return {
        "tool": "tokenize_corpus",
        "config": to_mapping(replace(config, **_HOW_IT_RUNS)),
        "inputs": inputs,
        "engine_check": check.as_mapping(),
        "documents": counts.documents,
        "text_bytes": counts.text_bytes,
        "corpus_tokens": counts.tokens,
        "bad_lines": len(counts.bad),
    }


def _num_workers(workers: int, total_bytes: int) -> int:
    if workers:
        return workers
    return 1 if total_bytes < SMALL_CORPUS_BYTES else cpu_count()


def _bytes_of(units: list[Unit]) -> int:
    return sum(os.path.getsize(unit.path) if unit.stop is None else unit.stop - unit.start for unit in units)


def _expected_bytes(paths: list[str]) -> int:
    packed = (".gz", ".zst", ".zstd", ".parquet")
    return sum(os.path.getsize(path) * (_COMPRESSION_GUESS if path.endswith(packed) else 1) for path in paths)
