"""``train``: pre-train or distil a model. One loop for teacher, reference and student.

    torchrun --nproc-per-node 4 tools/train.py --config FILE [key=value …]

A run folder that holds a checkpoint is continued from it; a finished one is left as it is.
"""

from pathlib import Path

from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.runtime import distributed_runtime
from megatron_kd.training.checkpoint import Progress, load_checkpoint
from megatron_kd.training.methods.method_builders import build_lm_term, build_loss, build_source
from megatron_kd.training.methods.source import restore_source
from megatron_kd.training.optimizer import build_optimizer
from megatron_kd.training.preflight import check_memory
from megatron_kd.training.run_folder import announce, checkpoint_to_resume, prepare_run_folder, sole_writer
from megatron_kd.training.setup import (
    build_student,
    build_teacher,
    open_datasets,
    plan_layout,
    running_teacher,
    student_architecture,
)
from megatron_kd.training.teacher_process import run_teacher_ranks
from megatron_kd.training.train_config import TrainConfig
from megatron_kd.training.train_step import TrainStep
from megatron_kd.training.trainer import Trainer

__all__ = ["TrainConfig", "run"]


def run(config: TrainConfig) -> Path:
    """Train and return the run folder."""
    with distributed_runtime(teacher_ranks=config.teacher.own_ranks) as runtime:
        if runtime.is_teacher:
            run_teacher_ranks(config, runtime)
            return Path(config.output)
        data, heldout = open_datasets(config)
        architecture = student_architecture(config, data)
        layout = plan_layout(config, architecture, data, runtime)
        seq_length = config.data.seq_length or data.seq_length
        check_memory(config, architecture, layout, running_teacher(config), seq_length, runtime.device)
        with sole_writer(Path(config.output)):
            start = checkpoint_to_resume(config, architecture, data)
            groups = create_process_groups(layout)
            teacher = build_teacher(config, architecture, data, layout, groups, runtime)
            model = build_student(config, architecture, data, layout, groups, runtime)
            optimizer = build_optimizer(config.optimizer, model, groups, bf16=config.training.precision == "bf16")
            source = build_source(config, data, groups, model, teacher, runtime.device)
            folder = prepare_run_folder(config)
            progress = load_checkpoint(start, model, optimizer, groups) if start else Progress()
            step = TrainStep(
                model=model,
                optimizer=optimizer,
                groups=groups,
                teacher=teacher,
                clip_grad=config.optimizer.clip_grad,
                micro_batch_loss=build_loss(config, teacher, groups),
                lm_term=build_lm_term(config, groups),
            )
            if start:
                restore_source(source, start)
            announce(config, architecture, layout, model, data, runtime, progress)
            trainer = Trainer(
                config, runtime, folder, data, heldout, architecture, layout, groups, model, optimizer, step, source
            )
            trainer.run(progress)
            return folder
