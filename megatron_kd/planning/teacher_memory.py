"""What a teacher that runs adds to a rank, wherever it runs: arithmetic, as in memory.py.

Co-located: its weights, the transient activations of a pass, the hidden states that wait on the student's last stage.
Remote: on the student's last stage its output layer (for the payload ``hidden``) and the hand-offs being received; on
its own ranks weights, activations of a pass, hand-offs that wait to be sent.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.planning.memory import (
    ELEMENT_BYTES,
    FFN_FUSED,
    RankMemory,
    padded_rows,
    rank_parameters,
    student_memory,
    together,
)

STASH_BYTES = 1024 << 20
"""teacher.stash_megabytes unless it says otherwise."""
PASSES_A_STAGE = 2
"""As teachers/colocated.py; a test compares them."""
BYTES_PER_ENTRY = 8
"""Of a sparse payload: an int32 id and an fp32 weight; a token's tail mass takes another 4."""
TAIL_BYTES = 4


@dataclass(frozen=True)
class PlacedTeacher:
    """A teacher that runs beside a student.

    Attributes:
        layout: its own: over the student's ranks, or over ranks of its own.
        is_remote: whether the ranks are its own.
        payload_ids: ids a token that a remote teacher sends; None where it sends hidden states.
    """

    architecture: ModelArchitecture
    layout: ParallelLayout
    is_remote: bool = False
    payload_ids: int | None = None
    stash_bytes: float = STASH_BYTES
    prefetch_depth: int = 2

    @property
    def is_dense(self) -> bool:
        """Whether the student's last stage computes the teacher's output layer."""
        return self.payload_ids is None

    def hand_off_bytes(self, positions: float, precision: str) -> float:
        """What is known of ``positions`` tokens, as it is sent."""
        if self.payload_ids is None:
            return positions * self.architecture.hidden_size * ELEMENT_BYTES[precision]
        return positions * (BYTES_PER_ENTRY * self.payload_ids + TAIL_BYTES)


def teacher_layout(student: ParallelLayout, tensor: int | None, pipeline: int | None) -> ParallelLayout:
    """The co-located teacher's layout over the student's ranks; None means as the student's.

    Raises:
        LayoutError: its sizes do not divide the ranks.
    """
    tensor, pipeline = tensor or student.tensor, pipeline or student.pipeline
    keys = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
                          sequence_parallel=student.sequence_parallel and tensor > 1)
    return ParallelLayout.for_world(keys, student.world_size)


def teacher_memory(
    architecture: ModelArchitecture,
    student: ParallelLayout,
    own: ParallelLayout,
    rank: int,
    *,
    precision: str,
    micro_batch_size: int,
    seq_length: int,
    micro_batches: int,
    stash_bytes: float = STASH_BYTES,
) -> RankMemory:
    """Memory of a co-located teacher on one rank, in a layout of its own over the student's ranks.

    Hidden states wait on the student's last stage, as far as the stash allows; the rest waits in host memory. Where the
    layouts differ, that stage holds its part of the teacher's head.
    """
    a, width = architecture, ELEMENT_BYTES[precision]
    positions = micro_batch_size * seq_length
    transient = positions * (2 * a.hidden_size + FFN_FUSED * a.ffn_hidden_size / own.tensor) * width
    kept = head = 0.0
    if student.coordinates(rank).pipeline == student.pipeline - 1:
        hidden = positions * a.hidden_size * width
        waiting = waiting_micro_batches(student, own, hidden, micro_batches, stash_bytes)
        kept = min(hidden / student.context * waiting, stash_bytes)
        if (student.tensor, student.pipeline) != (own.tensor, own.pipeline):
            head = padded_rows(a.vocab_size, student.tensor) / student.tensor * a.hidden_size * width
    return RankMemory(
        teacher_weights=rank_parameters(a, own, own.coordinates(rank).pipeline) * width + head,
        teacher_activations=transient + kept,
    )


def waiting_micro_batches(
    student: ParallelLayout, own: ParallelLayout, hidden_bytes: float, micro_batches: int, stash_bytes: float
) -> int:
    """Micro-batches whose hidden states, ``hidden_bytes`` each, wait on the student's last stage at a time.

    Under a pipeline a step's; else those of a wave, which keeps all of the teacher's replicas and stages busy
    (``teachers/colocated.py``).
    """
    if student.pipeline > 1:
        return micro_batches
    passes = 1 if own.pipeline == 1 else PASSES_A_STAGE * own.pipeline
    of_a_replica = min(passes, max(1, int(stash_bytes / 2 / hidden_bytes)))
    return min(micro_batches, max(1, -(-own.data * of_a_replica // student.data)))


def received_memory(
    student: ModelArchitecture, layout: ParallelLayout, stage: int, teacher: PlacedTeacher, *, precision: str,
    micro_batch_size: int, seq_length: int,
) -> RankMemory:
    """What a remote teacher's knowledge takes on a rank of the student: nothing but on its last stage."""
    if stage < layout.pipeline - 1:
        return RankMemory()
    rows = padded_rows(student.vocab_size, layout.tensor) // layout.tensor
    head = rows * teacher.architecture.hidden_size * ELEMENT_BYTES[precision] if teacher.is_dense else 0
    hand_off = teacher.hand_off_bytes(micro_batch_size * seq_length, precision)
    return RankMemory(teacher_weights=head, teacher_activations=teacher.prefetch_depth * hand_off)


def remote_rank_memory(
    teacher: PlacedTeacher, rank: int, *, precision: str, micro_batch_size: int, seq_length: int
) -> RankMemory:
    """One of a remote teacher's own ranks: weights, a pass, hand-offs that wait.

    The logits that a sparse payload is chosen from are not counted.
    """
    own = teacher.layout
    alone = teacher_memory(
        teacher.architecture, own, own, rank, precision=precision, micro_batch_size=micro_batch_size,
        seq_length=seq_length, micro_batches=1, stash_bytes=0,
    )
    if own.coordinates(rank).pipeline < own.pipeline - 1:
        return alone
    waiting = teacher.prefetch_depth * teacher.hand_off_bytes(micro_batch_size * seq_length, precision)
    return dataclasses.replace(alone, teacher_activations=alone.teacher_activations + waiting)


def stage_memory(
    student: ModelArchitecture, layout: ParallelLayout, stage: int, teacher: PlacedTeacher | None,
    loss_chunk_budget: int | None = None, **sizes: Any,
) -> RankMemory:
    """The fullest rank of the student's ``stage``, with what the teacher holds there; ``sizes`` as student_memory's."""
    models = 2 if teacher is not None and teacher.is_dense else 1
    alone = student_memory(student, layout, stage, layers=layout.stage_layers(student.num_layers),
                           models_in_loss=models, loss_chunk_budget=loss_chunk_budget, **sizes)
    if teacher is None:
        return alone
    if teacher.is_remote:
        of_a_batch = {name: value for name, value in sizes.items() if name != "micro_batches"}
        return together(alone, received_memory(student, layout, stage, teacher, **of_a_batch))
    own = teacher.layout
    ranks = (rank for rank in range(layout.world_size) if layout.coordinates(rank).pipeline == stage)
    if (layout.tensor, layout.pipeline) == (own.tensor, own.pipeline) and layout.context == 1:
        ranks = [next(ranks)]  # all of a stage are alike
    held = (teacher_memory(teacher.architecture, layout, own, rank, stash_bytes=teacher.stash_bytes, **sizes)
            for rank in ranks)
    return together(alone, max(held, key=lambda memory: memory.total))
