"""Scores of finished units beside the output, so that a killed run goes on where it was.

``<output>.partial/`` holds ``recipe.json`` (what is being computed) and one append-only file per writing rank of every
start. A record is a unit's scores with a checksum; a record that a kill cut short fails its checksum and is redone.

The loop that fills a journal: units handed out to free replicas, computed, and kept as they are done.
"""

import json
import logging
import os
import secrets
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from tqdm import tqdm

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.artefacts.folder_lock import lock_folder
from megatron_kd.errors import DataError
from megatron_kd.parallel.coordination import WorkQueue, on_main_rank
from megatron_kd.parallel.runtime import Runtime
from megatron_kd.scoring.micro_batches import MicroBatch, MicroBatchPlan

logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe.json"
_HEADER = struct.Struct("<4sIqqqd")
_MAGIC = b"UNIT"


class ScoreJournal:
    """The unfinished scores of one output.

    Args:
        output: what the scores will become.
        num_chunks: of the dataset.
    """

    def __init__(self, output: str | Path, num_chunks: int) -> None:
        output = Path(output)
        self.folder = output.parent / f"{output.name}.partial"
        self.num_chunks = num_chunks
        self._file: IO[bytes] | None = None
        self._lock: IO[str] | None = None

    def claim(self, recipe: str) -> None:
        """Make the folder, or check that it holds scores of the same recipe. For the main rank.

        Raises:
            DataError: it holds other scores, or another run is writing it.
        """
        self._lock = lock_folder(self.folder, "these scores")
        path = self.folder / RECIPE_NAME
        if not path.exists():
            write_file(path, json.dumps({"recipe": recipe}) + "\n")
            return
        found = json.loads(path.read_text(encoding="utf-8"))["recipe"]
        if found != recipe:
            raise DataError(
                f"{self.folder}: holds unfinished scores of another dataset, model or micro_batch_size "
                f"(recipe {found[:12]}, now {recipe[:12]}); remove it or choose another output"
            )

    def add(self, unit: int, first_chunk: int, scores: numpy.ndarray, nats: float) -> None:
        """Append a finished unit: float32 ``[n]`` scores of neighbouring chunks, and their summed nats."""
        if self._file is None:
            self._file = open(self.folder / f"scores-{os.getpid()}-{secrets.token_hex(4)}.part", "xb")
        payload = numpy.ascontiguousarray(scores, dtype="<f4").tobytes()
        body = _HEADER.pack(_MAGIC, 0, unit, first_chunk, len(scores), nats)[8:] + payload
        self._file.write(_MAGIC + struct.pack("<I", zlib.crc32(body)) + body)
        self._file.flush()

    def done_units(self) -> list[int]:
        """Numbers of the units that are there, ascending."""
        return sorted({unit for unit, *_ in self._records()})

    def gather(self) -> numpy.ndarray:
        """The scores of all chunks, float32 ``[num_chunks]``.

        Raises:
            DataError: some are missing.
        """
        scores = numpy.zeros(self.num_chunks, dtype=numpy.float32)
        is_there = numpy.zeros(self.num_chunks, dtype=bool)
        for _, first, values, _ in self._records():
            scores[first : first + len(values)] = values
            is_there[first : first + len(values)] = True
        if not is_there.all():
            raise DataError(
                f"{self.folder}: {int((~is_there).sum())} of {self.num_chunks} chunks have no score, the first is "
                f"chunk {int(numpy.argmin(is_there))}; do all ranks see the same file system? run again to fill them"
            )
        return scores

    def close(self) -> None:
        """Close this rank's file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Delete the folder: the output is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _records(self) -> Iterator[tuple[int, int, numpy.ndarray, float]]:
        for path in sorted(self.folder.glob("scores-*.part")):
            with open(path, "rb") as file:
                while (record := _read_record(file, self.num_chunks)) is not None:
                    yield record


def _read_record(file: IO[bytes], num_chunks: int) -> tuple[int, int, numpy.ndarray, float] | None:
    """The next whole record; None at the end, or where what follows is cut short or damaged."""
    head = file.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return None
    magic, checksum, unit, first, count, nats = _HEADER.unpack(head)
    if magic != _MAGIC or not 0 <= first <= first + count <= num_chunks:
        return None
    payload = file.read(4 * count)
    if len(payload) < 4 * count or zlib.crc32(head[8:] + payload) != checksum:
        return None
    return unit, first, numpy.frombuffer(payload, dtype="<f4"), nats


@dataclass(frozen=True)
class UnitScores:
    """Of a unit's chunks in dataset order: float32 ``[n]`` scores, NaN where nothing counts; and a total to keep."""

    scores: numpy.ndarray
    total: float


def fill_journal(
    tool: str,
    journal: ScoreJournal,
    plan: MicroBatchPlan,
    groups: ProcessGroupCollection,
    runtime: Runtime,
    compute: Callable[[list[MicroBatch], int], UnitScores | None],
) -> None:
    """Compute every unit that a claimed journal lacks. Collective over the world.

    Args:
        tool: named in messages.
        compute: (micro-batches, first chunk) → scores on the one rank of a replica that keeps them, None on the others.
    """
    name, done = on_main_rank(lambda: (secrets.token_hex(8), journal.done_units()))
    if done and runtime.is_main:
        logger.info(f"{len(done):,} of {plan.num_units:,} units were done before")
    queue = WorkQueue(sorted(set(range(plan.num_units)) - set(done)), name, groups, runtime.device)
    with tqdm(
        total=journal.num_chunks,
        initial=min(len(done) * plan.chunks_per_unit, journal.num_chunks),
        desc="score",
        unit="chunk",
        unit_scale=True,
        disable=not runtime.is_main,
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    ) as bar:
        for unit in queue:
            first = plan.chunk_range(unit)[0]
            found = compute(plan.unit(unit), first)
            if found is not None:
                journal.add(unit, first, found.scores, found.total)
            if runtime.is_main:
                bar.update(min((len(done) + queue.num_taken()) * plan.chunks_per_unit, bar.total) - bar.n)
    dist.barrier()
