"""Scores of a dataset, unit by unit: computed by whichever replica is free, and kept, so that a killed run resumes.

    units that are not done  →  WorkQueue  →  scores of a unit  →  record of the journal  →  …  →  all scores

A record of the journal (``artefacts/work_store.py``) has the unit's number for its name and float32 scores for its
payload. Every rank that computes scores appends to a journal of its own.
"""

import logging
import secrets
from collections.abc import Callable

import numpy as np
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.artefacts.work_store import WorkStore
from megatron_kd.errors import DataError
from megatron_kd.logs import progress_bar
from megatron_kd.parallel.coordination import WorkQueue, on_main_rank
from megatron_kd.parallel.runtime import Runtime
from megatron_kd.scoring.micro_batches import MicroBatch, MicroBatchPlan

logger = logging.getLogger(__name__)


class ScoreJournal:
    """The scores computed so far for one output.

    Args:
        store: of the output, claimed by the main rank; its recipe decides ``plan``.
        plan: the units of the dataset.
    """

    def __init__(self, store: WorkStore, plan: MicroBatchPlan) -> None:
        self._store = store
        self.plan = plan

    def add(self, unit: int, scores: np.ndarray) -> None:
        """Keep the scores of a unit's chunks, float32 ``[n]`` in dataset order; NaN where no position counts."""
        self._store.append(str(unit), np.ascontiguousarray(scores, dtype="<f4"))

    def end(self) -> None:
        """Close this rank's journal."""
        self._store.end_journal()

    def done_units(self) -> list[int]:
        """Return the numbers of the units that have scores, ascending."""
        return sorted({int(name) for name, _ in self._store.records()})

    def gather(self) -> np.ndarray:
        """Return the scores of all chunks, float32 ``[num_chunks]``.

        Raises:
            DataError: some are missing.
        """
        num_chunks = self.plan.num_chunks
        scores = np.zeros(num_chunks, dtype=np.float32)
        is_there = np.zeros(num_chunks, dtype=bool)
        for name, payload in self._store.records():
            first, stop = self.plan.chunk_range(int(name))
            scores[first:stop] = payload.view("<f4")
            is_there[first:stop] = True
        if not is_there.all():
            raise DataError(
                f"{self._store.folder}: {int((~is_there).sum())} of {num_chunks} chunks have no score, the first is "
                f"chunk {int(np.argmin(is_there))}; do all ranks see the same file system? run again to compute them"
            )
        return scores


def fill_journal(
    journal: ScoreJournal,
    groups: ProcessGroupCollection,
    runtime: Runtime,
    compute: Callable[[list[MicroBatch], int], np.ndarray | None],
) -> None:
    """Compute every unit that a claimed journal lacks. Collective over the world.

    Args:
        compute: (micro-batches, first chunk) → scores as :meth:`ScoreJournal.add` takes them, on the one rank of a
            replica that keeps them; None on the others.
    """
    plan = journal.plan
    name, done = on_main_rank(lambda: (secrets.token_hex(8), journal.done_units()))
    if done and runtime.is_main:
        logger.info(f"{len(done):,} of {plan.num_units:,} units were done before")
    queue = WorkQueue(sorted(set(range(plan.num_units)) - set(done)), name, groups, runtime.device)
    counted = min(len(done) * plan.chunks_per_unit, plan.num_chunks)
    with progress_bar(plan.num_chunks, "score", "chunk", initial=counted, shown=runtime.is_main) as bar:
        for unit in queue:
            scores = compute(plan.unit(unit), plan.chunk_range(unit)[0])
            if scores is not None:
                journal.add(unit, scores)
            if runtime.is_main:
                done_now = min((len(done) + queue.num_taken()) * plan.chunks_per_unit, plan.num_chunks)
                bar.update(done_now - counted)
                counted = done_now
    journal.end()
    dist.barrier()
