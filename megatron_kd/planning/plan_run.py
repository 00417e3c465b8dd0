"""``plan_run``: what a run will need and cost, before anything is started.

    python tools/plan_run.py --config examples/miniplm_pile_qwen/student_500m.yaml [plan.num_gpus=64 plan.gpu=h100 …]

Reads a training configuration with its ``plan.*`` keys, prints a table, and writes JSON where ``plan.output`` names a
file. Imports neither torch nor Megatron-Core, so that a plan takes a second on any machine.
"""

import json
import sys
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_kd.costs.gpus import GIB
from megatron_kd.costs.memory import RankMemory
from megatron_kd.models.architecture import ARCHITECTURES, AS_INIT_FROM
from megatron_kd.planning.plan import Plan, make_plan
from megatron_kd.planning.recommend import Candidate
from megatron_kd.teachers.teacher_config import NO_TEACHER, TeacherConfig
from megatron_kd.training.methods.method_table import METHODS
from megatron_kd.training.train_config import TrainConfig, TrainingDataConfig

PARTS = {
    "weights": "weights",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer state, this rank's share",
    "activations": "activations in flight",
    "loss": "loss: logit tiles, hidden gradients",
    "teacher_weights": "teacher's weights",
    "teacher_activations": "teacher's activations and hidden states",
}
SAME_COST = "also miniplm, seqkd"
"""Methods that train like plain pre-training on a corpus made before: their cost is offline."""
UNITS = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(frozen=True)
class PlannedDataConfig(TrainingDataConfig):
    """The ``data.*`` keys of training, without a dataset: a plan reads none."""

    path: str | tuple[str, ...] = ""
    eval_path: str | None = ""


@dataclass(frozen=True)
class PlannedTeacherConfig(TeacherConfig):
    """The ``teacher.*`` keys of training; a plan needs no checkpoint or cache of the teacher."""

    def placement_faults(self, but: Container[str] = ()) -> Iterator[str]:
        """Yield a fault for an unknown placement and for each missing key except the teacher's path."""
        yield from super().placement_faults(but=(self.where.source,))


@dataclass(frozen=True, kw_only=True)
class PlanRunConfig(TrainConfig):
    """The configuration of ``train`` with its ``plan.*`` keys; what a plan does not read need not be given."""

    data: PlannedDataConfig = field(default_factory=PlannedDataConfig)
    output: str = ""
    teacher: PlannedTeacherConfig = field(default_factory=PlannedTeacherConfig)

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values together."""
        yield from super().validate()
        if self.model.name == AS_INIT_FROM:
            yield f"'model.name' {AS_INIT_FROM} gives a plan no sizes: choose one of {', '.join(ARCHITECTURES)}"
        if self.teacher.placement != NO_TEACHER and self.plan.teacher is None:
            yield (
                f"'plan.teacher' (an architecture's name) is required, since teacher.placement is "
                f"{self.teacher.placement}"
            )


def run(config: PlanRunConfig) -> Plan:
    """Plan, print, and write the JSON file if one is asked for.

    Raises:
        ConfigError: the method needs a teacher that plan.teacher does not name.
        LayoutError: the layout does not divide the model, the batch or the number of GPUs.
    """
    plan = make_plan(config)
    sys.stdout.write(plan_text(plan))
    if config.plan.output is not None:
        path = Path(config.plan.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan.as_dict(), indent=2) + "\n", encoding="utf-8")
        sys.stdout.write(f"\n{path}\n")
    return plan


def plan_text(plan: Plan) -> str:
    """Return the whole plan as text for a terminal."""
    sections = [
        _models(plan),
        _budgets(plan),
        _memory(plan),
        _communication(plan),
        _costs(plan),
        _storage(plan),
        _recommendation(plan),
        _paper(plan),
    ]
    return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Return the lines of a table with aligned columns, the first flush left and the others flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
    return [text[0], "-" * len(text[0]), *text[1:]]


def amount(size: float) -> str:
    """Return a number of bytes as text: ``3.2 TB``."""
    for unit, name in UNITS:
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def _models(plan: Plan) -> list[str]:
    a = plan.assumptions
    head = (
        f"{plan.models[0].name}, {a['method']}, {a['train_iters']:,} steps of {a['global_batch_size']:,} x "
        f"{a['seq_length']:,} = {a['tokens']:.4g} tokens, {a['precision']}, "
        f"{a['num_gpus']} x {a['gpu']} at {a['mfu']:.0%} MFU"
    )
    rows = (
        [f"{m.role} {m.name}", f"{m.parameters:,}", f"{m.non_embedding:,}", f"{m.embedding:,}"] for m in plan.models
    )
    return [head, "", *table(["model", "parameters", "non-embedding", "embedding"], rows)]


def _budgets(plan: Plan) -> list[str]:
    rows = []
    for b in plan.budgets:
        printed = [f"{b.paper.formula:,}", f"{b.paper.printed:,}", f"{b.paper.deviation:+.1%}"] if b.paper else [""] * 3
        name = f"{b.method} ({SAME_COST})" if b.method == "none" else b.method
        rows.append([name, b.formula, f"{b.flops_per_token:.4g}", f"{b.steps:,}", *printed])
    columns = [
        "equal training FLOPs",
        "formula",
        "FLOPs/token",
        "steps",
        "paper's formula",
        "paper prints",
        "deviation",
    ]
    lines = table(columns, rows)
    lines.append("N_s, N_t: all parameters of student and teacher; per token a forward pass is 2 N, with backward 6 N")
    planned = [METHODS[b.method] for b in plan.budgets]
    uncounted = [method.name for method in planned if method.generates_text and not method.cost.student_rollout]
    if uncounted:
        lines.append(
            f"{', '.join(uncounted)}: not counting text generated while training, 2 N per token of the model that "
            "generates it"
        )
    return lines


def _memory(plan: Plan) -> list[str]:
    fits = max(stage.total for stage in (*plan.stages, *plan.teacher_stages)) <= plan.memory_limit
    lines = _stage_table(f"memory of a rank, {plan.layout}", plan.stages)
    if plan.remote is not None:
        lines += ["", *_stage_table(f"memory of a teacher's rank ({plan.remote.teacher_ranks})", plan.teacher_stages)]
    lines += [f"{'fits' if fits else 'DOES NOT FIT'} into {plan.memory_limit / GIB:.1f} GiB per GPU", *_pipeline(plan)]
    if plan.head_share:
        lines.append(f"the teacher's head on the student's last stage: +{plan.head_share:.0%} of the student's FLOPs")
    if plan.remote is not None:
        r = plan.remote
        lines.append(
            f"remote teacher: {r.teacher_share:.0%} of the FLOPs on {r.teacher_ranks} of {r.num_gpus} GPUs, "
            f"so a step takes {r.slowdown:.2f} x as long as with the work spread evenly; "
            f"{r.balanced_ranks} teacher ranks would come closest to that"
        )
    return lines


def _stage_table(title: str, stages: tuple[RankMemory, ...]) -> list[str]:
    header = [title, *(f"stage {i}" for i in range(len(stages)))] if len(stages) > 1 else [title, "GiB"]
    rows = [
        [text, *(f"{getattr(stage, part) / GIB:.2f}" for stage in stages)]
        for part, text in PARTS.items()
        if any(getattr(stage, part) for stage in stages)
    ]
    return table(header, [*rows, ["total", *(f"{stage.total / GIB:.2f}" for stage in stages)]])


def _pipeline(plan: Plan) -> list[str]:
    if len(plan.stages) == 1:
        return ["pipeline bubble 0%: one stage"]
    now, best = plan.split, plan.balanced
    lines = [
        f"pipeline bubble {plan.bubble:.1%}; slowest stage {now.slowest:.2f} x the mean with layers "
        f"{', '.join(map(str, now.layers))}"
    ]
    if best.layers != now.layers:
        keys = " ".join(best.keys) or "an even split"
        lines.append(f"better {', '.join(map(str, best.layers))} ({best.slowest:.2f} x): {keys}")
    return lines


def _communication(plan: Plan) -> list[str]:
    names = {
        "tensor": "tensor parallel",
        "pipeline": "pipeline",
        "data": "data parallel",
        "context": "context parallel",
        "hand_off": "teacher targets, received",
    }
    rows = [[text, amount(getattr(plan.traffic, name))] for name, text in names.items() if getattr(plan.traffic, name)]
    return table(["sent by a rank per step", "bytes"], rows) if rows else []


def _costs(plan: Plan) -> list[str]:
    rows = [[c.what, f"{c.flops:.3g}", f"{c.hours:,.1f}", f"{c.gpu_hours:,.0f}"] for c in plan.costs]
    return table(["cost", "FLOPs", "hours", "GPU-hours"], rows)


def _storage(plan: Plan) -> list[str]:
    a = plan.assumptions
    rows = [
        [f"corpus, {a['corpus_tokens']:.3g} tokens", amount(plan.corpus_bytes), ""],
        [f"difference-sampled, ratio {a['ratio']}", amount(plan.sampled_bytes), ""],
        ["score file of the corpus", amount(plan.score_bytes), ""],
        *(
            [f"cache of {a['tokens']:.3g} tokens: {c.name}", amount(c.total), f"{c.bytes_per_token:,.0f}"]
            for c in plan.caches
        ),
    ]
    return table(["storage", "bytes", "bytes/token"], rows)


def _recommendation(plan: Plan) -> list[str]:
    r = plan.recommendation
    best = r.candidate
    layout = f"{best.layout.describe()}, micro-batch {best.micro_batch_size}" if best else "none"
    teacher = f", teacher {r.placement}, payload {r.payload}" if r.placement != "none" else ""
    reasons = [*r.reasons, *([_step_time(best, plan.assumptions["mfu"])] if best else [])]
    keys = [f"  {' '.join(best.keys)}"] if best else []
    return [f"recommended: {layout}{teacher}", *keys, *(f"  - {reason}" for reason in reasons)]


def _step_time(best: Candidate, mfu: float) -> str:
    return (
        f"a step: {best.compute_seconds * 1e3:.1f} ms at the stated MFU, {best.bubble_seconds * 1e3:.1f} ms "
        f"bubble, {best.exposed_seconds * 1e3:.1f} ms exposed communication: "
        f"{mfu * best.compute_seconds / best.seconds:.1%} MFU in effect"
    )


def _paper(plan: Plan) -> list[str]:
    return list(_paper_lines(plan)) if plan.one_trillion else []


def _paper_lines(plan: Plan) -> Iterator[str]:
    yield "beside the MiniPLM paper (arXiv 2410.17215)"
    for budget in plan.budgets:
        if budget.paper and abs(budget.paper.deviation) > 0.03:
            yield (
                f"  - {budget.method}: the paper's formula gives {budget.paper.formula:,} steps, the paper prints "
                f"{budget.paper.printed:,} ({budget.paper.deviation:+.1%}); rounding does not explain the difference"
            )
    yield "  - the formulas use rounded sizes (0.2B, 0.5B, 1.2B, teacher 1.8B); 'steps' above uses all parameters"
    for reading in plan.offline_readings:
        yield f"  - offline {reading.printed:.0e} in print; {reading.counted}: {reading.flops:.3g}"
    yield f"  - C_1T (20 x 100K steps x 524,288 tokens = 1.0486e12): {plan.one_trillion:.4g} FLOPs"
