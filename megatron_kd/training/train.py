"""``train``: pre-train or distil a model. One loop for teacher, reference and student.

    torchrun --nproc-per-node 4 tools/train.py --config FILE [key=value …]

A run folder that holds a checkpoint is resumed from it; a finished one is left as it is.
"""

from pathlib import Path

from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.teachers.placements import build_teacher_ranks, plan_teacher
from megatron_kd.training.checkpoint import Progress, load_checkpoint
from megatron_kd.training.methods.method_builders import MethodParts, build_lm_term, build_losses, build_source
from megatron_kd.training.methods.source import restore_source
from megatron_kd.training.objective import FusedLoss, MicroBatchLoss
from megatron_kd.training.optimizer import build_optimizer
from megatron_kd.training.preflight import check_memory, check_teacher_ranks
from megatron_kd.training.run_folder import announce, checkpoint_to_resume, prepare_run_folder, sole_writer
from megatron_kd.training.train_config import TrainConfig
from megatron_kd.training.train_step import TrainStep
from megatron_kd.training.trainer import Trainer
from megatron_kd.training.training_run import ScheduledData, TrainingRun, build_student, build_teacher, open_run
from megatron_kd.training.watchdogs import ignored_stop_signals

__all__ = ["TrainConfig", "run"]


def run(config: TrainConfig) -> Path:
    """Train and return the run folder."""
    with distributed_runtime(teacher_ranks=config.teacher.own_ranks) as runtime:
        work = serve_student if runtime.is_teacher else train_student
        work(open_run(config, runtime))
    return Path(config.output)


def train_student(run: TrainingRun) -> None:
    """Train, on the student's ranks."""
    config = run.config
    check_memory(run)
    with sole_writer(run.folder):
        start = checkpoint_to_resume(run)
        groups = create_process_groups(run.layout)
        teacher = build_teacher(run, groups)
        model = build_student(run, groups)
        optimizer = build_optimizer(config.optimizer, model, groups, bf16=config.training.precision == "bf16")
        fused = FusedLoss(groups, config.distillation.loss)
        parts = MethodParts(run, groups, model, teacher, fused)
        losses = build_losses(parts)
        source = build_source(parts, losses)
        step = TrainStep(
            model=model,
            optimizer=optimizer,
            groups=groups,
            teacher=teacher,
            clip_grad=config.optimizer.clip_grad,
            micro_batch_loss=MicroBatchLoss(losses, teacher),
            lm_term=build_lm_term(config, fused),
        )
        prepare_run_folder(run)
        progress = Progress()
        if start is not None:
            progress = load_checkpoint(start, model, optimizer, groups)
            restore_source(source, start)
        announce(run, model, progress)
        Trainer(run, step, source, progress).train()


def serve_student(run: TrainingRun) -> None:
    """Run the teacher on ranks of its own until the student has finished: the same data and schedule, no training.

    A scheduler's signals reach all ranks: the student's save, and tell the teacher's to stop.
    """
    with ignored_stop_signals():
        student, keys = run.as_student(), run.config.teacher
        plan = plan_teacher(keys, student)
        check_teacher_ranks(run, plan.layout, plan.info.architecture)
        build_teacher_ranks(keys, student, plan, ScheduledData(run)).run()
