"""Two steps of ``train`` on the ranks of a test world, and every gradient of them as the move of the weights.

AdamW is turned into plain gradient descent by an epsilon far above every gradient, without decay and clipping: a
weight then moves by its gradient times lr / eps, so comparing moves compares gradients.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_kd.config import load_config
from megatron_kd.metrics.tracker import read_metrics
from tests.distributed.fresh_world import run_in_fresh_world
from tests.distributed.models.whole_weights import whole_weights
from tests.distributed.ranks import shared_ranks

STEPS = 2
EVERY_GRADIENT = [
    f"training.train_iters={STEPS}",
    "training.global_batch_size=16",
    "training.micro_batch_size=2",
    "optimizer.lr=1e5",
    "optimizer.min_lr=1e5",
    "optimizer.adam_eps=1e5",
    "optimizer.weight_decay=0",
    "optimizer.clip_grad=0",
    "distillation.method=vanilla_kd",
    "model.name=qwen_toy_student",
    "metrics.kd_lm_gradient_ratio_interval=1",
]
REPORTED = ("loss", "lm_loss", "kd_loss", "teacher_entropy", "tail_mass", "grad_norm", "kd_lm_gradient_ratio")


def two_steps_here(settings: list[str], stash_bytes: int | None = None) -> dict[str, Any]:
    """Train on this rank; its parts of the weights before and after, and what its teacher did."""
    from megatron_kd.logs import silence_known_noise
    from megatron_kd.models.parameters import global_indices, global_parameter_name, global_shape
    from megatron_kd.teachers import colocated
    from megatron_kd.training import train as module
    from megatron_kd.training.objective import unwrap
    from megatron_kd.training.trainer import Trainer

    silence_known_noise()
    seen: dict[str, Any] = {}

    def parts() -> list[Any]:
        found = []
        for chunk in map(unwrap, seen["student"]):
            for local_name, parameter in chunk.named_parameters():
                name = global_parameter_name(chunk, local_name)
                indices = global_indices(name, parameter, chunk)
                found.append((name, global_shape(name, parameter, chunk), indices, parameter.detach().clone()))
        return found

    def capture(name: str, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            seen[name] = function(*arguments, **keywords)
            if name == "student":
                seen["before"] = parts()
            return seen[name]

        return call

    colocated_teacher = colocated.ColocatedTeacher

    def with_stash(*arguments: Any, **keywords: Any) -> Any:
        return colocated_teacher(*arguments, **{**keywords, "stash_bytes": stash_bytes or keywords["stash_bytes"]})

    with (
        patch.object(colocated, "ColocatedTeacher", with_stash),
        patch.object(module, "build_student", capture("student", module.build_student)),
        patch.object(module, "build_teacher", capture("teacher", module.build_teacher)),
        patch.object(module, "build_teacher_ranks", capture("teacher", module.build_teacher_ranks)),
        patch.object(Trainer, "_save", lambda *_, **__: None),
    ):
        module.run(load_config(module.TrainConfig, None, settings))
    if "student" not in seen:
        return {"passes": seen["teacher"].passes, "replica": place(seen["teacher"]._groups),
                "trainable_teacher_parameters": trainable(seen["teacher"])}  # fmt: skip
    teacher = seen["teacher"]
    return {
        "before": seen["before"],
        "after": parts(),
        "passes": getattr(teacher, "passes", None),
        "replica": place(teacher._groups) if hasattr(teacher, "_groups") else None,
        "trainable_teacher_parameters": trainable(teacher),
        "stash": None if not hasattr(teacher, "stash") else vars(teacher.stash),
    }


def place(groups: Any) -> tuple[int, int, int]:
    """This rank's data-parallel, pipeline and tensor-parallel rank."""
    return groups.dp.rank(), groups.pp.rank(), groups.tp.rank()


def trainable(teacher: Any) -> int:
    """Parameters of a teacher that could be trained."""
    return sum(
        parameter.requires_grad
        for model_chunk in getattr(teacher, "_model_chunks", ())
        for parameter in model_chunk.parameters()
    )


def two_steps(world: int, settings: list[str], output: Path, **options: Any) -> dict[str, Any]:
    """Run on a world of ranks: ``losses`` (rows), ``gradients`` (name -> whole tensor), ``answers`` by rank."""
    settings = [*EVERY_GRADIENT, *settings, f"output={output}"]
    if "teacher.placement=remote" in settings:
        answers = run_in_fresh_world(world, two_steps_here, settings, **options)
    else:
        answers = shared_ranks(world).run(two_steps_here, settings, timeout=300, **options)
    students = [answer for answer in answers if "before" in answer]
    before, after = (whole_weights([{"parts": answer[when]} for answer in students]) for when in ("before", "after"))
    return {
        "losses": [row for row in read_metrics(output) if "loss" in row],
        "evaluations": [row for row in read_metrics(output) if "eval_loss" in row],
        "gradients": {name: before[name] - after[name] for name in before},
        "answers": answers,
    }


def assert_same(ours: dict[str, Any], reference: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Losses of every step and gradients of every parameter, relative to the reference."""
    assert len(ours["losses"]) == len(reference["losses"]) == STEPS
    for row, expected in zip(ours["losses"], reference["losses"], strict=True):
        assert [key for key in REPORTED if key in row] == [key for key in REPORTED if key in expected]
        for key in (key for key in REPORTED if key in expected):
            assert abs(row[key] - expected[key]) <= tolerance * abs(expected[key]), (key, row[key], expected[key])
        assert row["tokens"] == expected["tokens"]
    assert ours["gradients"].keys() == reference["gradients"].keys()
    for name, expected in reference["gradients"].items():
        difference = torch.linalg.vector_norm(ours["gradients"][name] - expected)
        norm = torch.linalg.vector_norm(expected)
        assert norm > 0, name
        assert difference <= tolerance * norm, (name, float(difference / norm))
