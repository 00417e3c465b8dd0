"""Which layout, and where the teacher runs: every layout that divides is tried, the reasons come with the answer."""

import dataclasses
from dataclasses import dataclass
from typing import Iterator

from megatron_kd.errors import LayoutError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.planning.communication import step_traffic
from megatron_kd.planning.config import PlanRunConfig
from megatron_kd.planning.hardware import GIB, GPUS
from megatron_kd.planning.memory import RankMemory, stage_memory
from megatron_kd.planning.pipeline import bubble_fraction

TENSOR_SIZES, PIPELINE_SIZES, MICRO_BATCHES = (1, 2, 4, 8), (1, 2, 3, 4, 6, 8, 12), (1, 2, 4, 8, 16, 32)
AS_GOOD = 0.03
"""Estimates closer than this are not told apart."""
LARGEST_HEAD_SHARE = 0.25
RUNS_THAT_PAY_FOR_A_CACHE = 2


@dataclass(frozen=True)
class Candidate:
    """A layout, what it needs and how long a step would take.

    Attributes:
        memory: of the fullest rank.
        compute_seconds: the step's FLOPs at the stated MFU.
        bubble_seconds, exposed_seconds: what the pipeline's bubble and unhidden communication would add; they rank
            layouts, while the plan's own times come from the stated MFU alone.
    """

    layout: ParallelLayout
    micro_batch_size: int
    micro_batches: int
    memory: RankMemory
    compute_seconds: float
    bubble_seconds: float
    exposed_seconds: float

    @property
    def seconds(self) -> float:
        """Estimated step time."""
        return self.compute_seconds + self.bubble_seconds + self.exposed_seconds


def evaluate_layout(
    config: PlanRunConfig,
    student: ModelArchitecture,
    teacher: ModelArchitecture | None,
    layout: ParallelLayout,
    micro_batch_size: int,
    flops_per_token: float,
    teacher_is_colocated: bool,
) -> Candidate:
    """Memory and time of one layout.

    Raises:
        LayoutError: the layout does not divide the model or the batch.
    """
    seq_length = config.data.seq_length or config.plan.seq_length
    for model in (student, *([teacher] if teacher and teacher_is_colocated else [])):
        layout.check_model(
            num_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups, ffn_hidden_size=model.ffn_hidden_size, seq_length=seq_length,
        )
    micro_batches = layout.micro_batches(config.training.global_batch_size, micro_batch_size)
    sizes = {"precision": config.training.precision, "micro_batch_size": micro_batch_size, "seq_length": seq_length,
             "micro_batches": micro_batches}
    memories = [
        stage_memory(student, teacher if teacher_is_colocated else None, layout, layout, stage,
                     models_in_loss=2 if teacher else 1, **sizes)
        for stage in range(layout.pipeline)
    ]
    gpu = GPUS[config.plan.gpu]
    tokens = config.training.global_batch_size * seq_length
    compute = flops_per_token * tokens / (config.plan.num_gpus * gpu.peak_tflops * 1e12 * config.plan.mfu)
    bubble = bubble_fraction(layout.pipeline, micro_batches, layout.virtual_pipeline)
    traffic = step_traffic(student, teacher, layout, remote_teacher=not teacher_is_colocated, **sizes)
    inside, outside = gpu.link_gb_per_second * 1e9, config.plan.network_gb_per_second * 1e9
    across = outside if layout.world_size > config.plan.gpus_per_node else inside
    # Gradients of the last micro-batch are reduced during its backward pass (parallel.overlap_grad_reduce).
    hidden = compute / micro_batches
    exposed = traffic.tensor / inside + (traffic.pipeline + traffic.context) / across
    exposed += max(0.0, traffic.data / across - hidden)
    return Candidate(
        layout=layout, micro_batch_size=micro_batch_size, micro_batches=micro_batches,
        memory=max(memories, key=lambda memory: memory.total), compute_seconds=compute,
        bubble_seconds=compute * bubble / (1 - bubble), exposed_seconds=exposed,
    )


def candidates(
    config: PlanRunConfig, student: ModelArchitecture, teacher: ModelArchitecture | None, flops_per_token: float,
    teacher_is_colocated: bool = True,
) -> Iterator[Candidate]:
    """Every layout of plan.num_gpus that divides model and batch, with the largest micro-batch that fits."""
    limit = memory_limit(config)
    for tensor in (size for size in TENSOR_SIZES if size <= config.plan.gpus_per_node):
        for pipeline in PIPELINE_SIZES:
            keys = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline,
                                  sequence_parallel=tensor > 1)
            tried = []
            for micro_batch_size in MICRO_BATCHES:
                try:
                    layout = ParallelLayout.for_world(keys, config.plan.num_gpus)
                    tried.append(evaluate_layout(config, student, teacher, layout, micro_batch_size, flops_per_token,
                                                 teacher_is_colocated))
                except LayoutError:
                    continue
            fitting = [candidate for candidate in tried if candidate.memory.total <= limit]
            if fitting:
                yield simplest(fitting)


def simplest(found: list[Candidate]) -> Candidate:
    """Of those as good as the fastest: the least tensor and pipeline parallel, with the largest micro-batch."""
    fastest = min(candidate.seconds for candidate in found)
    return min(
        (candidate for candidate in found if candidate.seconds <= fastest * (1 + AS_GOOD)),
        key=lambda candidate: (candidate.layout.tensor * candidate.layout.pipeline, candidate.layout.pipeline,
                               -candidate.micro_batch_size),
    )


def memory_limit(config: PlanRunConfig) -> float:
    """Bytes of a GPU that a layout may fill."""
    return GPUS[config.plan.gpu].memory_bytes * config.plan.usable_memory


@dataclass(frozen=True)
class Recommendation:
    """The layout that would be fastest, or None where nothing fits, the teacher's placement, and why."""

    candidate: Candidate | None
    placement: str
    payload: str
    reasons: tuple[str, ...]


def recommend(
    config: PlanRunConfig, student: ModelArchitecture, teacher: ModelArchitecture | None, flops_per_token: float,
    teacher_flops_share: float, head_share: float,
) -> Recommendation:
    """Search the layouts and say where the teacher should run.

    Args:
        teacher_flops_share: the teacher's FLOPs over all of a step's.
        head_share: FLOPs of the teacher's output layer over the student's forward and backward.
    """
    found = list(candidates(config, student, teacher, flops_per_token))
    placement, reasons = "none", []
    if teacher is not None:
        placement = "colocated"
        if not found:
            found = list(candidates(config, student, teacher, flops_per_token, teacher_is_colocated=False))
            placement = "remote" if found else "none"
            reasons.append("student and teacher fit no GPU together in any layout: the teacher goes to GPUs of its own")
    if not found:
        limit = memory_limit(config) / GIB
        return Recommendation(None, placement, "hidden", (*reasons, f"no layout of {config.plan.num_gpus} GPUs fits "
                              f"into {limit:.0f} GiB a GPU: more GPUs, a longer pipeline, or smaller micro-batches"))
    best = simplest(found)
    reasons += list(_layout_reasons(best, found, memory_limit(config)))
    payload = "hidden"
    if teacher is not None:
        teacher_reasons, payload = _teacher_reasons(placement, teacher_flops_share, head_share, best)
        reasons += teacher_reasons
    return Recommendation(best, placement, payload, tuple(reasons))


def _layout_reasons(best: Candidate, found: list[Candidate], limit: float) -> Iterator[str]:
    yield (f"{best.layout.describe()}, micro-batch {best.micro_batch_size}: its fullest rank needs "
           f"{best.memory.total / GIB:.1f} of {limit / GIB:.1f} GiB")
    if best.layout.tensor == best.layout.pipeline == 1:
        yield "model and optimizer fit a GPU whole, so data parallelism alone: one reduction a step, which can overlap"
    others = [candidate for candidate in found if (candidate.layout.tensor, candidate.layout.pipeline)
              != (best.layout.tensor, best.layout.pipeline)]
    if others:
        other = min(others, key=lambda candidate: candidate.seconds)
        slower = other.seconds / best.seconds - 1
        yield (f"the best other, {other.layout.describe()}, is estimated {abs(slower):.1%} "
               f"{'slower' if slower > 0 else 'faster'} by bubble and communication"
               + (", which is nothing to add parallelism for" if slower <= 0 else ""))


def _teacher_reasons(
    placement: str, teacher_share: float, head_share: float, best: Candidate
) -> tuple[list[str], str]:
    payload = "hidden"
    reasons = [
        f"teacher {placement}: its forward pass is {teacher_share:.0%} of a step's FLOPs wherever it runs; "
        + ("on the student's ranks no GPU waits for another and nothing is sent" if placement == "colocated"
           else f"give it about {teacher_share:.0%} of the GPUs, so that neither side waits")
    ]
    if best.layout.pipeline > 1 or placement == "remote":
        payload = "sampled" if head_share > LARGEST_HEAD_SHARE and placement == "remote" else "hidden"
    reasons.append(
        f"payload {payload}: the teacher's head adds {head_share:.0%} to the student's own FLOPs on its last stage"
        + (", more than the split can even out cheaply: its own ranks compute it" if payload == "sampled"
           else "; an uneven layer split absorbs it where there is a pipeline")
    )
    reasons.append(
        f"cached instead: pays from {RUNS_THAT_PAY_FOR_A_CACHE} students on the same corpus, since the cache costs "
        f"one pass of the teacher and saves {teacher_share:.0%} of every run"
    )
    return reasons, payload


def as_dict(candidate: Candidate) -> dict:
    """Plain values for JSON."""
    return {**dataclasses.asdict(candidate), "seconds": candidate.seconds, "memory_total": candidate.memory.total}
