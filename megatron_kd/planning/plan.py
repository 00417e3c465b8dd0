"""The whole plan as one value: what a run needs and costs, from a training configuration and its ``plan.*`` keys.

Caches are sized as ``cache_teacher_logits`` writes them (docs/teacher_cache.md); the whole distribution is listed for
comparison only.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_kd.costs.flops import (
    difference_sampling_flops,
    forward_flops,
    matched_steps,
    training_flops,
)
from megatron_kd.costs.gpus import GPUS
from megatron_kd.costs.memory import RankMemory, remote_rank_memory, stage_memory
from megatron_kd.planning import paper
from megatron_kd.planning.overheads import (
    LayerSplit,
    StepTraffic,
    balanced_split,
    bubble_fraction,
    layer_split,
    step_traffic,
)
from megatron_kd.planning.recommend import Recommendation, memory_limit, recommend
from megatron_kd.planning.setting import RemoteBalance, Setting, remote_balance, setting_of
from megatron_kd.training.methods.method_table import METHODS
from megatron_kd.training.train_config import TrainConfig

ID_BYTES, WIDE_ID_BYTES = 2, 4
SMALLEST_WIDE_VOCABULARY = 65_500
INDEX_BYTES_PER_CHUNK = 20  # length (4), pointer (8), document index (8)
SCORE_BYTES = 4
FULL_LOGIT_BYTES = 2  # bf16
TOP_K = 64
DRAWS, DIFFERENT_IDS = 50, 12.1
"""Draws per token, and the mean number of different ids among them (Sparse Logit Sampling, arXiv 2503.16870)."""
HEAD_IDS, HEAD_BITS, REST_BITS = 8, 16, 11
TOKEN_BITS = 17
"""Bits per token beside its ids: whether it has targets, and its tail mass."""
CACHE_INDEX_BYTES_PER_CHUNK = 28


@dataclass(frozen=True)
class ModelSize:
    """The parameter counts of a model in the plan."""

    role: str
    name: str
    parameters: int
    non_embedding: int
    embedding: int


@dataclass(frozen=True)
class MethodBudget:
    """One method's steps at the FLOPs of ``plan.baseline_steps`` of plain pre-training."""

    method: str
    formula: str
    flops_per_token: float
    steps: int
    paper: paper.PrintedSteps | None


@dataclass(frozen=True)
class Cost:
    """FLOPs and their time: FLOPs / (GPUs · peak · MFU), times the slowdown that a remote teacher causes."""

    what: str
    flops: float
    hours: float
    gpu_hours: float


@dataclass(frozen=True)
class CacheSize:
    """The size of a teacher cache of the training tokens."""

    name: str
    bytes_per_token: float
    total: float


@dataclass(frozen=True)
class Plan:
    """Everything that ``plan_run`` prints: bytes, FLOPs, hours.

    Attributes:
        stages: memory of the fullest rank of each of the student's stages.
        teacher_stages: memory of the fullest rank of each of a remote teacher's stages.
        split: layers of the stages as configured.
        balanced: layers of the stages as they would be best.
        head_share: FLOPs of the teacher's output layer on the student's last stage over the student's own.
    """

    assumptions: dict[str, Any]
    models: tuple[ModelSize, ...]
    budgets: tuple[MethodBudget, ...]
    layout: str
    stages: tuple[RankMemory, ...]
    teacher_stages: tuple[RankMemory, ...]
    remote: RemoteBalance | None
    memory_limit: float
    bubble: float
    split: LayerSplit
    balanced: LayerSplit
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
        """Return the plan as nested plain values, for JSON."""
        return dataclasses.asdict(self)


def make_plan(config: TrainConfig) -> Plan:
    """Plan the run of a configuration.

    Raises:
        ConfigError: the method needs a teacher that plan.teacher does not name.
        LayoutError: the layout does not divide the model, the batch or the number of GPUs.
    """
    setting = setting_of(config)
    student, layout, sizes = setting.student, setting.layout, setting.sizes
    tokens, balance = _tokens(config), remote_balance(setting, config.plan.num_gpus)
    vocabulary, seq_length = student.vocab_size, sizes["seq_length"]
    return Plan(
        assumptions=_assumptions(config, sizes),
        models=tuple(_models(config, setting)),
        budgets=tuple(_budgets(config, setting)),
        layout=layout.describe(),
        stages=tuple(
            stage_memory(student, layout, stage, setting.placed, setting.loss_tile_budget, **sizes)
            for stage in range(layout.pipeline)
        ),
        teacher_stages=tuple(_remote_stages(setting)),
        remote=balance,
        memory_limit=memory_limit(config),
        bubble=bubble_fraction(layout.pipeline, sizes["micro_batches"], layout.virtual_pipeline),
        split=layer_split(student, setting.dense_teacher, layout.stage_layers(student.num_layers)),
        balanced=balanced_split(student, setting.dense_teacher, layout.pipeline, layout.virtual_pipeline),
        head_share=setting.head_share,
        traffic=step_traffic(student, layout, setting.placed, **sizes),
        costs=tuple(_costs(config, setting, setting.flops_per_token * tokens, balance.slowdown if balance else 1.0)),
        corpus_bytes=corpus_bytes(config.plan.corpus_tokens, vocabulary, seq_length),
        sampled_bytes=corpus_bytes(config.plan.corpus_tokens * config.plan.ratio, vocabulary, seq_length),
        score_bytes=score_bytes(config.plan.corpus_tokens, seq_length),
        caches=tuple(cache_sizes(tokens, vocabulary, seq_length)),
        recommendation=recommend(config, setting),
        offline_readings=tuple(paper.offline_readings()),
        one_trillion=paper.one_trillion_flops(config.model.name),
    )


def _remote_stages(setting: Setting) -> Iterator[RankMemory]:
    """Yield the memory of the fullest rank of each of a remote teacher's stages; nothing for other teachers."""
    placed = setting.placed
    if placed is None or not placed.is_remote:
        return
    batch_sizes = {name: value for name, value in setting.sizes.items() if name != "micro_batches"}
    for stage in range(placed.layout.pipeline):
        yield remote_rank_memory(placed, placed.layout.rank_at(tensor=0, data=0, pipeline=stage), **batch_sizes)


def _tokens(config: TrainConfig) -> int:
    seq_length = config.data.seq_length or config.plan.seq_length
    return config.training.train_iters * config.training.global_batch_size * seq_length


def _assumptions(config: TrainConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    gpu = GPUS[config.plan.gpu]
    return {
        "gpu": gpu.name,
        "peak_tflops": gpu.peak_tflops,
        "num_gpus": config.plan.num_gpus,
        "mfu": config.plan.mfu,
        "precision": config.training.precision,
        "method": config.distillation.method,
        "teacher_placement": config.teacher.placement,
        "train_iters": config.training.train_iters,
        "global_batch_size": config.training.global_batch_size,
        **sizes,
        "tokens": _tokens(config),
        "corpus_tokens": config.plan.corpus_tokens,
        "reference_tokens": config.plan.reference_tokens,
        "ratio": config.plan.ratio,
    }


def _models(config: TrainConfig, setting: Setting) -> Iterator[ModelSize]:
    named = (
        ("student", config.model.name, setting.student),
        ("teacher", config.plan.teacher, setting.teacher),
        ("reference", config.plan.reference, setting.reference),
    )
    for role, name, model in named:
        if name is not None and model is not None:
            yield ModelSize(role, name, model.parameters, model.non_embedding_parameters, model.embedding_parameters)


def _budgets(config: TrainConfig, setting: Setting) -> Iterator[MethodBudget]:
    steps = config.plan.baseline_steps or config.training.train_iters
    student = setting.student.parameters
    teacher = setting.teacher.parameters if setting.teacher else 0
    for method in METHODS.values():
        if method.needs_teacher and not teacher:
            continue
        yield MethodBudget(
            method=method.name,
            formula=str(method.cost),
            flops_per_token=training_flops(student, 1, method.cost, teacher),
            steps=matched_steps(steps, student, teacher, method.cost),
            paper=paper.printed_steps(config.model.name, str(config.plan.teacher), method.name),
        )


def _costs(config: TrainConfig, setting: Setting, training: float, slowdown: float) -> list[Cost]:
    plan = config.plan
    rate = plan.num_gpus * GPUS[plan.gpu].peak_tflops * 1e12 * plan.mfu * 3600

    def cost(what: str, flops: float, slowdown: float = 1.0) -> Cost:
        return Cost(what, flops, flops / rate * slowdown, flops / rate * slowdown * plan.num_gpus)

    costs = [cost("training", training, slowdown)]
    if setting.teacher is not None:
        corpus, split = round(plan.corpus_tokens), round(plan.reference_tokens)
        teacher, reference = setting.teacher.parameters, setting.reference.parameters
        costs += [
            cost("offline: train the reference model", training_flops(reference, split)),
            cost("offline: reference scores the corpus", forward_flops(reference, corpus)),
            cost("offline: teacher scores the corpus", forward_flops(teacher, corpus)),
            cost(
                "offline: difference sampling, all three", difference_sampling_flops(teacher, reference, corpus, split)
            ),
            cost(
                "offline: teacher over the training tokens (a cache, or SeqKD's text)",
                forward_flops(teacher, _tokens(config)),
            ),
        ]
    return costs


def corpus_bytes(tokens: float, vocab_size: int, seq_length: int) -> float:
    """Return the size of a chunk dataset of ``tokens`` ids, data and index."""
    ids = WIDE_ID_BYTES if vocab_size >= SMALLEST_WIDE_VOCABULARY else ID_BYTES
    return tokens * ids + tokens / (seq_length + 1) * INDEX_BYTES_PER_CHUNK


def score_bytes(tokens: float, seq_length: int) -> float:
    """Return the size of a score file, one float per chunk."""
    return tokens / (seq_length + 1) * SCORE_BYTES


def top_k_token_bytes(k: int, vocab_size: int) -> float:
    """Return the bytes per token of the codec ``top_k``."""
    head, rest = min(k, HEAD_IDS), max(k - HEAD_IDS, 0)
    return (k * _bits(vocab_size - 1) + HEAD_BITS * head + REST_BITS * rest + TOKEN_BITS) / 8


def sampled_token_bytes(draws: int, different_ids: float, vocab_size: int) -> float:
    """Return the bytes per token of the codec ``sampled``."""
    count_bits = _bits(draws)
    return (different_ids * (_bits(vocab_size - 1) + count_bits) + count_bits + TOKEN_BITS) / 8


def cache_sizes(tokens: float, vocab_size: int, seq_length: int) -> list[CacheSize]:
    """Return the size of the teacher targets for ``tokens``, whole and under each codec."""
    index = CACHE_INDEX_BYTES_PER_CHUNK / seq_length
    per_token = {
        "full distribution, bf16": FULL_LOGIT_BYTES * vocab_size,
        f"top_k, {TOP_K} ids": top_k_token_bytes(TOP_K, vocab_size) + index,
        f"sampled, {DRAWS} draws, {DIFFERENT_IDS} ids": sampled_token_bytes(DRAWS, DIFFERENT_IDS, vocab_size) + index,
    }
    return [CacheSize(name, size, size * tokens) for name, size in per_token.items()]


def _bits(largest: int) -> int:
    return largest.bit_length()
