"""The loop that fills a journal: units handed out to free replicas, computed, and kept as they are done."""

import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from tqdm import tqdm

from megatron_kd.parallel.agreement import on_main_rank
from megatron_kd.parallel.runtime import Runtime
from megatron_kd.scoring.hand_out import WorkQueue
from megatron_kd.scoring.journal import ScoreJournal
from megatron_kd.scoring.micro_batches import MicroBatch, MicroBatchPlan


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
        sys.stderr.write(f"{tool}: {len(done):,} of {plan.num_units:,} units were done before\n")
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
