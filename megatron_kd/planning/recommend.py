"""Recommended layout and teacher placement, with reasons; every layout that divides the model is tried."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_kd.costs.gpus import GIB, GPUS
from megatron_kd.costs.memory import PlacedTeacher, RankMemory, stage_memory, teacher_layout
from megatron_kd.errors import LayoutError
from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.planning.overheads import LayerSplit, balanced_split, bubble_fraction, step_traffic
from megatron_kd.planning.setting import Setting
from megatron_kd.training.train_config import TrainConfig

TENSOR_SIZES, PIPELINE_SIZES, MICRO_BATCHES = (1, 2, 4, 8), (1, 2, 3, 4, 6, 8, 12), (1, 2, 4, 8, 16, 32)
AS_GOOD = 0.03
"""Relative difference of two time estimates below which they count as equal."""
LARGEST_HEAD_SHARE = 0.25
RUNS_THAT_PAY_FOR_A_CACHE = 2


@dataclass(frozen=True)
class Candidate:
    """A layout, its memory, and the estimated time of a step.

    Attributes:
        split: layers of its pipeline's stages.
        memory: memory of the fullest rank.
        compute_seconds: time of the step's FLOPs at the stated MFU.
        bubble_seconds: time added by the pipeline's bubble and by a slowest stage above the mean.
        exposed_seconds: time added by communication that no computation overlaps. Both rank layouts only: the plan's
            own times follow from the stated MFU alone.
    """

    layout: ParallelLayout
    split: LayerSplit
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

    @property
    def keys(self) -> tuple[str, ...]:
        """Overrides that configure this candidate."""
        sizes = {
            "parallel.tensor_model_parallel_size": self.layout.tensor,
            "parallel.pipeline_model_parallel_size": self.layout.pipeline,
        }
        keys = [f"{name}={size}" for name, size in sizes.items() if size > 1]
        keys += ["parallel.sequence_parallel=true"] if self.layout.sequence_parallel else []
        if self.layout.data * self.layout.context > 1:  # the estimate overlaps the reduction with the last micro-batch
            keys += ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
        return (*keys, *self.split.keys, f"training.micro_batch_size={self.micro_batch_size}")


@dataclass(frozen=True)
class Recommendation:
    """The recommended layout (None where nothing fits), the teacher's placement and payload, and the reasons."""

    candidate: Candidate | None
    placement: str
    payload: str
    reasons: tuple[str, ...]


def recommend(config: TrainConfig, setting: Setting) -> Recommendation:
    """Search the layouts and choose where the teacher runs."""
    found = list(candidates(config, setting))
    placement, reasons = "none", []
    if setting.placed is not None:
        placement = "colocated"
        if not found:
            found = list(candidates(config, setting, teacher_is_colocated=False))
            placement = "remote" if found else "none"
            reasons.append(
                "student and teacher do not fit on one GPU together in any layout"
                + (": the teacher needs GPUs of its own" if found else ", and neither does the student alone")
            )
    if not found:
        limit = memory_limit(config) / GIB
        return Recommendation(
            None,
            placement,
            "hidden",
            (
                *reasons,
                f"no layout of {config.plan.num_gpus} GPUs fits into {limit:.0f} GiB per GPU: use more GPUs, a longer "
                "pipeline or smaller micro-batches",
            ),
        )
    best = simplest(found)
    reasons += list(_layout_reasons(best, found, memory_limit(config)))
    payload = "hidden"
    if setting.placed is not None:
        payload, teacher_reasons = _teacher_reasons(placement, setting, best)
        reasons += teacher_reasons
    return Recommendation(best, placement, payload, tuple(reasons))


def candidates(config: TrainConfig, setting: Setting, teacher_is_colocated: bool = True) -> Iterator[Candidate]:
    """Yield every layout of ``plan.num_gpus`` that divides model and batch, with the best micro-batch that fits.

    The GPUs of a remote teacher are not subtracted: the reasons say how many it should get.
    """
    limit = memory_limit(config)
    for tensor in (size for size in TENSOR_SIZES if size <= config.plan.gpus_per_node):
        for pipeline in (size for size in PIPELINE_SIZES if size <= setting.student.num_layers):
            split = balanced_split(setting.student, _teacher(setting), pipeline)
            tried = []
            for micro_batch_size in MICRO_BATCHES:
                try:
                    layout = _layout(tensor, split, config.plan.num_gpus)
                    found = evaluate_layout(config, setting, layout, split, micro_batch_size, teacher_is_colocated)
                except LayoutError:
                    continue
                tried.append(found)
            fitting = [candidate for candidate in tried if candidate.memory.total <= limit]
            if fitting:
                yield simplest(fitting)


def evaluate_layout(
    config: TrainConfig,
    setting: Setting,
    layout: ParallelLayout,
    split: LayerSplit,
    micro_batch_size: int,
    teacher_is_colocated: bool,
) -> Candidate:
    """Estimate memory and step time of one layout.

    Raises:
        LayoutError: the layout does not divide a model or the batch.
    """
    student, seq_length = setting.student, setting.sizes["seq_length"]
    _check(layout, student, seq_length)
    placed = _placed(setting, layout, teacher_is_colocated)
    if placed is not None and not placed.is_remote:
        _check(placed.layout, placed.architecture, seq_length)
    micro_batches = layout.micro_batches(config.training.global_batch_size, micro_batch_size)
    sizes = setting.sizes | {"micro_batch_size": micro_batch_size, "micro_batches": micro_batches}
    memories = (
        stage_memory(student, layout, stage, placed, setting.loss_tile_budget, **sizes)
        for stage in range(layout.pipeline)
    )
    gpu = GPUS[config.plan.gpu]
    tokens = config.training.global_batch_size * seq_length
    compute = setting.flops_per_token * tokens / (config.plan.num_gpus * gpu.peak_tflops * 1e12 * config.plan.mfu)
    bubble = bubble_fraction(layout.pipeline, micro_batches, layout.virtual_pipeline)
    traffic = step_traffic(student, layout, placed, **sizes)
    inside, outside = gpu.link_gb_per_second * 1e9, config.plan.network_gb_per_second * 1e9
    across = outside if layout.world_size > config.plan.gpus_per_node else inside
    # Gradients of the last micro-batch are reduced during its backward pass (parallel.overlap_grad_reduce).
    hidden = compute / micro_batches
    exposed = traffic.tensor / inside + (traffic.pipeline + traffic.context) / across
    exposed += max(0.0, traffic.data / across - hidden)
    return Candidate(
        layout=layout,
        split=split,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        memory=max(memories, key=lambda memory: memory.total),
        compute_seconds=compute,
        bubble_seconds=compute * (split.slowest / (1 - bubble) - 1),
        exposed_seconds=exposed,
    )


def simplest(found: list[Candidate]) -> Candidate:
    """Return the candidate with the least tensor and pipeline parallelism among those about as fast as the fastest.

    Of several micro-batch sizes the largest is chosen.
    """
    fastest = min(candidate.seconds for candidate in found)
    return min(
        (candidate for candidate in found if candidate.seconds <= fastest * (1 + AS_GOOD)),
        key=lambda candidate: (
            candidate.layout.tensor * candidate.layout.pipeline,
            candidate.layout.pipeline,
            -candidate.micro_batch_size,
        ),
    )


def memory_limit(config: TrainConfig) -> float:
    """Return the bytes of a GPU that a layout may fill."""
    return GPUS[config.plan.gpu].memory_bytes * config.plan.usable_memory


def _layout(tensor: int, split: LayerSplit, num_gpus: int) -> ParallelLayout:
    ends = (split.layers[0], split.layers[-1]) if split.keys else (None, None)
    keys = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=len(split.layers),
        sequence_parallel=tensor > 1,
        num_layers_in_first_pipeline_stage=ends[0],
        num_layers_in_last_pipeline_stage=ends[1],
    )
    return ParallelLayout.for_world(keys, num_gpus)


def _check(layout: ParallelLayout, model: ModelArchitecture, seq_length: int) -> None:
    layout.check_model(model, seq_length)


def _teacher(setting: Setting) -> ModelArchitecture | None:
    return setting.placed.architecture if setting.placed is not None else None


def _placed(setting: Setting, layout: ParallelLayout, is_colocated: bool) -> PlacedTeacher | None:
    """Place the setting's teacher beside ``layout``: co-located in the same layout, or remote with dense payload."""
    teacher = _teacher(setting)
    if teacher is None:
        return None
    if is_colocated:
        return PlacedTeacher(teacher, teacher_layout(layout, None, None))
    return PlacedTeacher(teacher, layout, is_remote=True)


def _layout_reasons(best: Candidate, found: list[Candidate], limit: float) -> Iterator[str]:
    yield (
        f"{best.layout.describe()}, micro-batch {best.micro_batch_size}: the fullest rank needs "
        f"{best.memory.total / GIB:.1f} of {limit / GIB:.1f} GiB"
    )
    if best.layout.tensor == best.layout.pipeline == 1:
        yield "model and optimizer fit on one GPU, so data parallelism suffices: one reduction per step can overlap"
    if best.split.keys:
        yield (
            f"layers {', '.join(map(str, best.split.layers))}: the last stage computes the output layers as well; the "
            f"slowest stage does {best.split.slowest:.2f} x the mean work"
        )
    others = [
        candidate
        for candidate in found
        if (candidate.layout.tensor, candidate.layout.pipeline) != (best.layout.tensor, best.layout.pipeline)
    ]
    if others:
        other = min(others, key=lambda candidate: candidate.seconds)
        slower = other.seconds / best.seconds - 1
        yield (
            f"the best alternative, {other.layout.describe()}, is estimated {abs(slower):.1%} "
            f"{'slower' if slower > 0 else 'faster'} by bubble and communication"
            + (", too little to add parallelism for" if slower <= 0 else "")
        )


def _teacher_reasons(placement: str, setting: Setting, best: Candidate) -> tuple[str, list[str]]:
    teacher_share = 1 - 6 * setting.student.parameters / setting.flops_per_token
    head_share = setting.head_share_if_dense
    payload = "sampled" if head_share > LARGEST_HEAD_SHARE and placement == "remote" else "hidden"
    where = (
        "on the student's ranks no GPU waits and nothing is sent"
        if placement == "colocated"
        else f"give it about {teacher_share:.0%} of the GPUs, so that neither side waits"
    )
    relief = (
        "too much for the last stage, so the teacher's ranks compute it"
        if payload == "sampled"
        else "without a pipeline it unbalances nothing"
        if best.layout.pipeline == 1
        else "the uneven split makes room for it"
    )
    return payload, [
        f"teacher {placement}: its forward pass is {teacher_share:.0%} of a step's FLOPs wherever it runs; {where}",
        f"payload {payload}: the teacher's head adds {head_share:.0%} to the student's own FLOPs on its last stage; "
        + relief,
        f"a cache instead pays off from {RUNS_THAT_PAY_FOR_A_CACHE} students on the same corpus: it costs one pass of "
        f"the teacher and saves {teacher_share:.0%} of every run",
    ]
