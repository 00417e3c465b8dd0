"""The whole plan as one value: what a run costs and needs, from a training configuration and its ``plan.*`` keys."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from megatron_kd.errors import ConfigError, LayoutError
from megatron_kd.models.architecture import ModelArchitecture, architecture_by_name
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.planning import paper
from megatron_kd.planning.communication import StepTraffic, step_traffic
from megatron_kd.planning.config import PlanRunConfig
from megatron_kd.planning.flops import (
    METHOD_FLOPS,
    difference_sampling_flops,
    forward_flops,
    matched_steps,
    training_flops,
)
from megatron_kd.planning.hardware import GPUS
from megatron_kd.planning.memory import RankMemory, stage_memory, teacher_layout
from megatron_kd.planning.pipeline import LayerSplit, balanced_split, bubble_fraction, teacher_head_flops
from megatron_kd.planning.recommend import Recommendation, recommend
from megatron_kd.planning.storage import CacheSize, cache_sizes, corpus_bytes, score_bytes

TOY_VOCABULARY = 512


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model in the plan."""

    role: str
    name: str
    parameters: int
    non_embedding: int
    embedding: int


@dataclass(frozen=True)
class MethodBudget:
    """One method at the FLOPs of ``plan.baseline_steps`` of plain pre-training."""

    method: str
    flops_per_token: float
    steps: int
    paper: paper.PrintedSteps | None


@dataclass(frozen=True)
class Cost:
    """FLOPs with their time: FLOPs / (GPUs · peak · MFU)."""

    what: str
    flops: float
    hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """Everything that ``plan_run`` prints. Bytes, FLOPs, hours; ``stages`` holds a rank's memory for every stage."""

    assumptions: dict[str, Any]
    models: tuple[ModelSize, ...]
    budgets: tuple[MethodBudget, ...]
    layout: str
    stages: tuple[RankMemory, ...]
    memory_limit: float
    bubble: float
    split: LayerSplit
    head_share: float
    traffic: StepTraffic
    costs: tuple[Cost, ...]
    corpus_bytes: float
    sampled_bytes: float
    score_bytes: float
    caches: tuple[CacheSize, ...]
    recommendation: Recommendation
    offline_readings: tuple[paper.OfflineReading, ...]
    one_trillion: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values for JSON."""
        return dataclasses.asdict(self)


def make_plan(config: PlanRunConfig) -> Plan:
    """The plan of a configuration.

    Raises:
        ConfigError: the method needs a teacher that plan.teacher does not name.
        LayoutError: the layout does not divide the model, the batch or the number of GPUs.
    """
    student = architecture_by_name(config.model.name).with_vocab_size(TOY_VOCABULARY)
    teacher = _teacher(config)
    reference = architecture_by_name(config.plan.reference).with_vocab_size(TOY_VOCABULARY)
    method = _method_with_formula(config, teacher)
    layout = ParallelLayout.for_world(config.parallel, config.plan.num_gpus)
    sizes = _sizes(config, layout)
    runs_teacher = teacher if method != "none" else None
    colocated = runs_teacher if config.teacher.placement in ("colocated", "none") else None
    own = teacher_layout(layout, config.teacher.tensor_model_parallel_size,
                         config.teacher.pipeline_model_parallel_size)
    _check(layout, student, "student", sizes["seq_length"])
    if colocated is not None:
        _check(own, colocated, "teacher", sizes["seq_length"])
    per_token = training_flops(student.parameters, 1, method, runs_teacher.parameters if runs_teacher else 0)
    head_share = teacher_head_flops(runs_teacher) / (6 * student.parameters) if runs_teacher else 0.0
    vocabulary, seq_length = student.vocab_size, sizes["seq_length"]
    named = [("student", config.model.name, student), ("teacher", config.plan.teacher, teacher),
             ("reference", config.plan.reference, reference)]
    return Plan(
        assumptions=_assumptions(config, sizes),
        models=tuple(_model_size(*model) for model in named if model[2] is not None),
        budgets=tuple(_budgets(config, student, teacher)),
        layout=layout.describe(),
        stages=tuple(
            stage_memory(student, colocated, layout, own, stage, models_in_loss=2 if runs_teacher else 1,
                         stash_bytes=config.teacher.stash_megabytes << 20, **sizes)
            for stage in range(layout.pipeline)
        ),
        memory_limit=GPUS[config.plan.gpu].memory_bytes * config.plan.usable_memory,
        bubble=bubble_fraction(layout.pipeline, sizes["micro_batches"], layout.virtual_pipeline),
        split=balanced_split(student, runs_teacher, layout.pipeline),
        head_share=head_share,
        traffic=step_traffic(student, runs_teacher, layout, remote_teacher=colocated is None, **sizes),
        costs=tuple(_costs(config, student, teacher, reference, per_token * _tokens(config, seq_length))),
        corpus_bytes=corpus_bytes(config.plan.corpus_tokens, vocabulary, seq_length),
        sampled_bytes=corpus_bytes(config.plan.corpus_tokens * config.plan.ratio, vocabulary, seq_length),
        score_bytes=score_bytes(config.plan.corpus_tokens, seq_length),
        caches=tuple(cache_sizes(_tokens(config, seq_length), vocabulary)),
        recommendation=recommend(config, student, runs_teacher, per_token,
                                 1 - 6 * student.parameters / per_token, head_share),
        offline_readings=tuple(paper.offline_readings()),
        one_trillion=paper.one_trillion_flops(config.model.name),
    )


def _teacher(config: PlanRunConfig) -> ModelArchitecture | None:
    if config.plan.teacher is None:
        return None
    return architecture_by_name(config.plan.teacher).with_vocab_size(TOY_VOCABULARY)


def _method_with_formula(config: PlanRunConfig, teacher: ModelArchitecture | None) -> str:
    """The training method; a cached teacher costs nothing while training."""
    method = config.distillation.method
    if method not in METHOD_FLOPS:
        raise ConfigError(f"distillation.method '{method}' has no cost formula; plan one of {', '.join(METHOD_FLOPS)}")
    if METHOD_FLOPS[method][1] and teacher is None:
        raise ConfigError(f"distillation.method '{method}' runs a teacher: name its architecture in plan.teacher")
    return "none" if config.teacher.placement == "cached" else method


def _check(layout: ParallelLayout, model: ModelArchitecture, role: str, seq_length: int) -> None:
    try:
        layout.check_model(
            num_layers=model.num_layers, num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups, ffn_hidden_size=model.ffn_hidden_size, seq_length=seq_length,
        )
    except LayoutError as error:
        raise LayoutError(f"the {role} under {layout.describe()}: {error}") from None


def _sizes(config: PlanRunConfig, layout: ParallelLayout) -> dict[str, Any]:
    training = config.training
    return {
        "precision": training.precision,
        "micro_batch_size": training.micro_batch_size,
        "seq_length": config.data.seq_length or config.plan.seq_length,
        "micro_batches": layout.micro_batches(training.global_batch_size, training.micro_batch_size),
    }


def _tokens(config: PlanRunConfig, seq_length: int) -> int:
    return config.training.train_iters * config.training.global_batch_size * seq_length


def _assumptions(config: PlanRunConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    gpu = GPUS[config.plan.gpu]
    return {
        "gpu": gpu.name, "peak_tflops": gpu.peak_tflops, "num_gpus": config.plan.num_gpus, "mfu": config.plan.mfu,
        "precision": config.training.precision, "method": config.distillation.method,
        "teacher_placement": config.teacher.placement, "train_iters": config.training.train_iters,
        "global_batch_size": config.training.global_batch_size, **sizes,
        "tokens": _tokens(config, sizes["seq_length"]), "corpus_tokens": config.plan.corpus_tokens,
        "reference_tokens": config.plan.reference_tokens, "ratio": config.plan.ratio,
    }


def _model_size(role: str, name: str | None, model: ModelArchitecture) -> ModelSize:
    return ModelSize(role, str(name), model.parameters, model.non_embedding_parameters, model.embedding_parameters)


def _budgets(
    config: PlanRunConfig, student: ModelArchitecture, teacher: ModelArchitecture | None
) -> list[MethodBudget]:
    steps = config.plan.baseline_steps or config.training.train_iters
    budgets = []
    for method, (_, teacher_factor) in METHOD_FLOPS.items():
        if teacher_factor and teacher is None:
            continue
        teacher_parameters = teacher.parameters if teacher else 0
        budgets.append(MethodBudget(
            method=method,
            flops_per_token=training_flops(student.parameters, 1, method, teacher_parameters),
            steps=matched_steps(steps, student.parameters, teacher_parameters, method),
            paper=paper.printed_steps(config.model.name, str(config.plan.teacher), method),
        ))
    return budgets


def _costs(
    config: PlanRunConfig, student: ModelArchitecture, teacher: ModelArchitecture | None,
    reference: ModelArchitecture, training: float,
) -> list[Cost]:
    plan = config.plan
    rate = plan.num_gpus * GPUS[plan.gpu].peak_tflops * 1e12 * plan.mfu * 3600

    def cost(what: str, flops: float) -> Cost:
        return Cost(what, flops, flops / rate, flops / rate * plan.num_gpus)

    costs = [cost("training", training)]
    if teacher is not None:
        corpus, split = round(plan.corpus_tokens), round(plan.reference_tokens)
        costs += [
            cost("offline: train the reference model", training_flops(reference.parameters, split)),
            cost("offline: reference scores the corpus", forward_flops(reference.parameters, corpus)),
            cost("offline: teacher scores the corpus", forward_flops(teacher.parameters, corpus)),
            cost("offline: difference sampling, all three",
                 difference_sampling_flops(teacher.parameters, reference.parameters, corpus, split)),
        ]
        cached = forward_flops(teacher.parameters, config.training.train_iters * config.training.global_batch_size
                               * (config.data.seq_length or plan.seq_length))
        costs.append(cost("offline: teacher over the training tokens (a cache, or SeqKD's text)", cached))
    return costs
