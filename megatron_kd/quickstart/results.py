"""Collects the quickstart's run folders into a :class:`~megatron_kd.evaluation.report.Report`."""

import json
import platform
from pathlib import Path
from typing import Any

from megatron_kd.artefacts.manifest import versions
from megatron_kd.checkpoints.weights import open_checkpoint
from megatron_kd.costs.flops import difference_sampling_flops
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.workers import cpu_count
from megatron_kd.errors import DataError
from megatron_kd.evaluation.bigram import fit_bigram, score_bigram
from megatron_kd.evaluation.report import CurvePoint, ModelResult, Report
from megatron_kd.metrics.tracker import read_metrics
from megatron_kd.quickstart import recipe

FLOPS_TOLERANCE = 0.01
"""Relative; whole steps cannot match exactly, and differ by at most half a step of the most expensive method."""
FLOPS_TOLERANCE_WITH_TEXT = 0.03
"""Relative, with methods that decide at random how often they generate text."""


def model_result(name: str, run: Path, hf: Path | None = None, offline_flops: int = 0) -> ModelResult:
    """Read the result of a finished run from its metrics and its newest checkpoint.

    Raises:
        DataError: the run has no evaluation at its last step.
    """
    rows = read_metrics(run)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    if not steps or not evaluations or evaluations[-1]["step"] != steps[-1]["step"]:
        raise DataError(f"{run}: metrics.jsonl has no evaluation at the last step; set data.eval_path and train again")
    info, last = open_checkpoint(run), evaluations[-1]
    training = info.manifest["config"]["training"]
    return ModelResult(
        name=name,
        run_path=str(run),
        hf_path=str(hf) if hf else None,
        parameters=info.architecture.parameters,
        steps=last["step"],
        train_tokens=last["step"] * training["global_batch_size"] * info.manifest["seq_length"],
        train_flops=last["train_flops"],
        offline_flops=offline_flops,
        heldout_loss=last["eval_loss"],
        bits_per_byte=last["bits_per_byte"],
        seconds=steps[-1]["seconds"],
        curve=tuple(CurvePoint(row["train_flops"], row["eval_loss"]) for row in evaluations),
    )


def collect_report(seconds: float, skipped_steps: int = 0, all_methods: bool = False) -> Report:
    """Collect the results of all steps.

    Args:
        seconds: wall-clock time of this run of the quickstart.
        skipped_steps: number of steps that an earlier run had done, whose time ``seconds`` does not include.
        all_methods: include the students whose methods generate text.

    Raises:
        DataError: a run is not finished, or the students did not get equal training FLOPs.
    """
    corpus, heldout = ChunkDataset.open(recipe.TRAIN_DATA), ChunkDataset.open(recipe.HELDOUT_DATA)
    teacher = model_result("Teacher", recipe.run_folder("teacher"))
    reference = model_result("Reference", recipe.run_folder("reference"))
    offline = difference_sampling_flops(
        teacher.parameters, reference.parameters, corpus.num_tokens, reference.train_tokens
    )
    students = tuple(
        model_result(
            student.method,
            recipe.run_folder(student.step),
            recipe.hf_folder(student.step),
            _offline_flops(student, offline),
        )
        for student in recipe.chosen_students(all_methods)
    )
    second = recipe.SECOND_SEED_RUN
    second_seed = model_result(second.method, recipe.run_folder(second.step))
    _require_equal_flops((*students, second_seed), FLOPS_TOLERANCE_WITH_TEXT if all_methods else FLOPS_TOLERANCE)
    bigram = score_bigram(fit_bigram(corpus), heldout)
    return Report(
        heldout=str(recipe.HELDOUT_DATA),
        students=students,
        second_seed=second_seed,
        teacher=teacher,
        reference=reference,
        bigram_loss=bigram.loss,
        bigram_bits_per_byte=bigram.bits_per_byte,
        seconds=seconds,
        continuing=tuple(student.method for student in recipe.chosen_students(all_methods) if student.continues),
        facts={"steps done before": skipped_steps, **_facts(corpus, heldout, bigram.tokens)},
    )


def _offline_flops(student: recipe.Student, difference_sampling: int) -> int:
    if "sample" in student.needs:
        return difference_sampling
    if "generate_seqkd" in student.needs:
        return ChunkDataset.open(recipe.GENERATED_DATA).manifest["producer"]["flops"]
    return 0


def _require_equal_flops(students: tuple[ModelResult, ...], tolerance: float) -> None:
    costs = {student.name: student.train_flops for student in students}
    if max(costs.values()) > min(costs.values()) * (1 + tolerance):
        shown = ", ".join(f"{name} {cost:.3e}" for name, cost in costs.items())
        raise DataError(f"the students' training FLOPs differ by more than {tolerance:.0%}: {shown}")


def _facts(corpus: ChunkDataset, heldout: ChunkDataset, heldout_predictions: int) -> dict[str, Any]:
    sampled, reference = ChunkDataset.open(recipe.SAMPLED_DATA), ChunkDataset.open(recipe.REFERENCE_DATA)
    config = json.loads(json.dumps(open_checkpoint(recipe.run_folder("pretrain")).manifest["config"]))
    return {
        "corpus": f"{corpus.num_tokens:,} tokens, of which difference sampling kept {sampled.num_tokens:,}",
        "reference split": f"{reference.num_tokens:,} tokens",
        "held-out split": f"{heldout_predictions:,} predicted tokens",
        "vocabulary": f"{corpus.vocab_size:,} ids",
        "student precision": config["training"]["precision"],
        "machine": f"{platform.machine()}, {cpu_count()} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
