"""``train``: pre-train or distil a model. One loop for teacher, reference and student.

    torchrun --nproc-per-node 4 tools/train.py --config FILE [key=value …]

A run folder that holds a checkpoint is continued from it; a finished one is left as it is.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.config import dump_yaml
from megatron_kd.data.artefact_folder import write_file
from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.loader import BatchSchedule, ChunkOrder
from megatron_kd.data.prefetch import prefetch
from megatron_kd.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from megatron_kd.metrics.tracker import RunTracker
from megatron_kd.models.architecture import ModelArchitecture, architecture_by_name
from megatron_kd.models.gpt import HiddenStateGPTModel, ModelConfig, Precision, build_model, parameter_count
from megatron_kd.models.initialization import initialize_weights
from megatron_kd.models.layer_specs import choose_layer_spec
from megatron_kd.models.loading import check_same_tokenizer
from megatron_kd.models.weights import load_weights, open_checkpoint
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout, as_mapping
from megatron_kd.parallel.runtime import Runtime, distributed_runtime, seed_everything
from megatron_kd.planning.flops import training_flops
from megatron_kd.scoring.chunk_losses import heldout_loss
from megatron_kd.teachers.colocated import ColocatedTeacher
from megatron_kd.teachers.interface import Teacher, TeacherConfig
from megatron_kd.training.checkpoint import Progress, load_checkpoint, newest_whole_checkpoint, save_checkpoint
from megatron_kd.training.objective import DistillationConfig, LossReduction, MicroBatchLoss, build_objective
from megatron_kd.training.optimizer import OptimizerConfig, build_optimizer, learning_rate
from megatron_kd.training.train_step import StepResult, TrainStep


@dataclass(frozen=True)
class TrainingDataConfig:
    """The ``data.*`` keys of training."""

    path: str
    eval_path: str | None = None
    seq_length: int | None = None
    """None means the dataset's."""
    shuffle: bool = True


@dataclass(frozen=True)
class TrainingConfig:
    """The ``training.*`` keys."""

    train_iters: int = 1000
    global_batch_size: int = 8
    micro_batch_size: int = 8
    seed: int = 10
    loss_reduction: LossReduction = "token"
    precision: Precision = "fp32"
    eval_interval: int | None = None
    """None evaluates at the end only (where ``data.eval_path`` is given)."""
    save_interval: int | None = None
    """None saves at the end only."""
    keep_checkpoints: int | None = 2

    def validate(self) -> Iterator[str]:
        """Faults in the values, one message each."""
        for name in ("train_iters", "global_batch_size", "micro_batch_size", "eval_interval", "save_interval",
                     "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"'training.{name}' must be at least 1, not {value}"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that ``train`` reads."""

    data: TrainingDataConfig
    output: str
    """The run folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def validate(self) -> Iterator[str]:
        """Faults in the values together, one message each."""
        if self.distillation.method != "none" and self.teacher.placement == "none":
            yield f"'distillation.method' {self.distillation.method} needs 'teacher.placement' (colocated) and its path"
        if self.distillation.method == "none" and self.teacher.placement != "none":
            yield f"'teacher.placement' is {self.teacher.placement}, but 'distillation.method' none does not use a teacher"
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            own, student = getattr(self.teacher, name), getattr(self.parallel, name)
            if own is not None and own != student:
                yield f"'teacher.{name}' {own} differs from the student's {student}: not available yet"


def run(config: TrainConfig) -> Path:
    """Train and return the run folder."""
    with distributed_runtime() as runtime:
        data, heldout = open_datasets(config)
        architecture = architecture_by_name(config.model.name).with_vocab_size(data.vocab_size)
        layout, micro_batches = plan_layout(config, architecture, data, runtime)
        groups = create_process_groups(layout)
        teacher = build_teacher(config, data, layout, groups, runtime)
        model = build_student(config, architecture, data, layout, groups, runtime)
        optimizer = build_optimizer(config.optimizer, model, groups, bf16=config.training.precision == "bf16")
        folder = prepare_run_folder(config, runtime)
        progress = resume(folder, config, data, model, optimizer, groups, runtime)
        step = TrainStep(
            model=model, optimizer=optimizer, groups=groups, teacher=teacher, reduction=config.training.loss_reduction,
            clip_grad=config.optimizer.clip_grad,
            micro_batch_loss=MicroBatchLoss(build_objective(config.distillation), teacher, groups,
                                            config.training.loss_reduction, unwrap),
        )
        announce(config, architecture, layout, model, data, runtime, progress)
        Trainer(config, runtime, folder, data, heldout, architecture, layout, groups, model, optimizer, step).run(progress)
        return folder


class Trainer:
    """The loop: batches in order, steps, metrics, evaluation, checkpoints."""

    def __init__(self, config: TrainConfig, runtime: Runtime, folder: Path, data: ChunkDataset,
                 heldout: ChunkDataset | None, architecture: ModelArchitecture, layout: ParallelLayout,
                 groups: ProcessGroupCollection, model: list[DistributedDataParallel], optimizer: ChainedOptimizer,
                 step: TrainStep):
        self.config, self.runtime, self.folder = config, runtime, folder
        self.data, self.heldout = data, heldout
        self.architecture, self.layout, self.groups = architecture, layout, groups
        self.model, self.optimizer, self.step = model, optimizer, step
        self.schedule = BatchSchedule(
            ChunkOrder(data.num_chunks, seed=config.training.seed, shuffle=config.data.shuffle),
            config.training.global_batch_size,
        )
        teacher = open_checkpoint(config.teacher.path).architecture.parameters if step.teacher is not None else 0
        self.flops_per_token = training_flops(architecture.parameters, 1, config.distillation.method, teacher)

    def run(self, progress: Progress) -> None:
        """Train from ``progress`` to the end."""
        settings = self.config.training
        tracker = RunTracker(self.folder, settings.train_iters, progress.step, self.runtime.is_main,
                             self.config.model.name)
        try:
            for batches in prefetch(lambda: self._batches(progress.step), depth=2):
                progress = self._train_one(batches, progress, tracker)
                if _is_due(progress.step, settings.eval_interval, settings.train_iters):
                    self._evaluate(progress, tracker)
                if _is_due(progress.step, settings.save_interval, settings.train_iters):
                    tracker.flush()
                    self._save(progress)
        finally:
            tracker.close()

    def _train_one(self, batches: Sequence[Batch], progress: Progress, tracker: RunTracker) -> Progress:
        started = time.perf_counter()
        rate = learning_rate(progress.step, self.config.optimizer, self.config.training.train_iters)
        try:
            result = self.step([batch.to(self.runtime.device) for batch in batches], rate)
        except NonFiniteLossError as error:
            chunks = self.schedule.chunks(progress.step).tolist()
            raise NonFiniteLossError(f"step {progress.step + 1}: {error}; chunks of the batch: {chunks}") from None
        seconds = time.perf_counter() - started
        progress = Progress(progress.step + 1, progress.tokens + result.tokens, progress.seconds + seconds)
        tracker.step(self._row(progress, result, rate, seconds))
        return progress

    def _row(self, progress: Progress, result: StepResult, rate: float, seconds: float) -> dict[str, Any]:
        settings = self.config.training
        positions = settings.global_batch_size * self._seq_length
        return {
            "step": progress.step, "tokens": progress.tokens, "loss": result.loss, "lm_loss": result.lm_loss,
            "kd_loss": result.kd_loss, "teacher_entropy": result.teacher_entropy, "grad_norm": result.grad_norm,
            "learning_rate": rate, "step_seconds": seconds, "tokens_per_second": positions / seconds,
            "tflops_per_second": self.flops_per_token * positions / seconds / 1e12,
            "train_flops": self.flops_per_token * positions * progress.step, "seconds": progress.seconds,
        }

    def _evaluate(self, progress: Progress, tracker: RunTracker) -> None:
        if self.heldout is None:
            return
        chunks = [unwrap(chunk) for chunk in self.model]
        totals = heldout_loss(chunks, self.groups, self.heldout, device=self.runtime.device,
                              micro_batch_size=self.config.training.micro_batch_size)
        positions = self.config.training.global_batch_size * self._seq_length
        tracker.evaluation({
            "step": progress.step, "tokens": progress.tokens, "eval_loss": totals.loss,
            "bits_per_byte": totals.bits_per_byte, "eval_tokens": totals.tokens,
            "train_flops": self.flops_per_token * positions * progress.step,
        })

    def _save(self, progress: Progress) -> None:
        save_checkpoint(
            self.folder / "checkpoints", progress, self.model, self.optimizer, self.groups,
            architecture=self.architecture, keep=self.config.training.keep_checkpoints,
            about={
                "tokenizer_hash": self.data.tokenizer_hash, "tokenizer_path": str(self.data.tokenizer_path.absolute()),
                "eos_id": self.data.eos_id, "dataset_fingerprint": self.data.fingerprint, "dataset_path": self.config.data.path,
                "seq_length": self._seq_length, "precision": self.config.training.precision,
                "layout": as_mapping(self.layout), "config": dataclasses.asdict(self.config),
            },
        )

    def _batches(self, first_step: int) -> Iterator[list[Batch]]:
        settings = self.config.training
        for step in range(first_step, settings.train_iters):
            rows = self.schedule.micro_batches(step, self.groups.dp.rank(), self.groups.dp.size(),
                                               settings.micro_batch_size)
            yield [make_batch(self.data, indices, self._seq_length) for indices in rows]

    @property
    def _seq_length(self) -> int:
        return self.config.data.seq_length or self.data.seq_length


def open_datasets(config: TrainConfig) -> tuple[ChunkDataset, ChunkDataset | None]:
    """The training and the held-out dataset.

    Raises:
        DataError: one is missing or damaged, has longer chunks than ``data.seq_length``, or another tokenizer.
    """
    data = ChunkDataset.open(config.data.path)
    heldout = ChunkDataset.open(config.data.eval_path) if config.data.eval_path else None
    if config.data.seq_length is not None and config.data.seq_length < data.seq_length:
        raise DataError(f"data.seq_length {config.data.seq_length} is below the {data.seq_length} of {config.data.path}: "
                        "tokenise again with shorter chunks")
    if heldout is not None and heldout.tokenizer_hash != data.tokenizer_hash:
        raise DataError(f"{config.data.eval_path} has tokenizer {heldout.tokenizer_hash}, "
                        f"{config.data.path} has {data.tokenizer_hash}")
    return data, heldout


def plan_layout(config: TrainConfig, architecture: ModelArchitecture, data: ChunkDataset,
                runtime: Runtime) -> tuple[ParallelLayout, int]:
    """The layout of this world and its micro-batches per step, checked against the model and the batch."""
    if architecture.vocab_size < data.vocab_size:
        raise ConfigError(f"model.name {config.model.name} has {architecture.vocab_size} ids, the dataset's tokenizer "
                          f"{data.vocab_size}: choose a model with a larger vocabulary")
    layout = ParallelLayout.for_world(config.parallel, runtime.world_size)
    layout.check_model(
        num_layers=architecture.num_layers, num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups, ffn_hidden_size=architecture.ffn_hidden_size,
        seq_length=config.data.seq_length or data.seq_length,
    )
    return layout, layout.micro_batches(config.training.global_batch_size, config.training.micro_batch_size)


def build_student(config: TrainConfig, architecture: ModelArchitecture, data: ChunkDataset, layout: ParallelLayout,
                  groups: ProcessGroupCollection, runtime: Runtime) -> list[DistributedDataParallel]:
    """The trainable model: chunks with their initial weights, wrapped in Megatron-Core's DDP."""
    seed_everything(config.training.seed, groups)
    chunks = build_model(architecture, layout, groups, precision=config.training.precision, device=runtime.device,
                         layer_spec=config.model.layer_spec,
                         max_sequence_length=config.data.seq_length or data.seq_length)
    if config.model.init_from is not None:
        info = open_checkpoint(config.model.init_from)
        check_same_tokenizer(info, data)
        load_weights(chunks, groups, info)
    else:
        for chunk in chunks:
            initialize_weights(chunk, architecture.init_std, config.training.seed)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    model = [DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=i > 0, pg_collection=groups)
             for i, chunk in enumerate(chunks)]
    for chunk in model:
        connect_schedule(chunk, groups)
    return model


def connect_schedule(model: DistributedDataParallel, groups: ProcessGroupCollection) -> None:
    """Tell Megatron-Core's schedules how to synchronise the gradients of ``model``."""
    settings = model.module.config

    def finalize(chunks: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **_: Any) -> None:
        finalize_model_grads(chunks, num_tokens, pg_collection=groups)

    settings.finalize_model_grads_func = finalize
    if model.ddp_config.overlap_grad_reduce:
        settings.no_sync_func = model.no_sync


def build_teacher(config: TrainConfig, data: ChunkDataset, layout: ParallelLayout, groups: ProcessGroupCollection,
                  runtime: Runtime) -> Teacher | None:
    """The teacher that the configuration asks for, with its weights; None without distillation."""
    if config.teacher.placement == "none" or config.teacher.path is None:
        return None
    info = open_checkpoint(config.teacher.path)
    check_same_tokenizer(info, data)
    seq_length = config.data.seq_length or data.seq_length
    layout = dataclasses.replace(layout, virtual_pipeline=None)
    layout.check_model(
        num_layers=info.architecture.num_layers, num_attention_heads=info.architecture.num_attention_heads,
        num_query_groups=info.architecture.num_query_groups, ffn_hidden_size=info.architecture.ffn_hidden_size,
        seq_length=seq_length,
    )
    chunks = build_model(info.architecture, layout, groups, precision=config.training.precision, device=runtime.device,
                         layer_spec=config.model.layer_spec, max_sequence_length=seq_length)
    load_weights(chunks, groups, info)
    return ColocatedTeacher(chunks, groups)


def prepare_run_folder(config: TrainConfig, runtime: Runtime) -> Path:
    """Create the run folder with its ``config.yaml``."""
    folder = Path(config.output)
    if runtime.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"output {folder} cannot be a run folder: {error.strerror}") from None
        write_file(folder / "config.yaml", dump_yaml(config))
    return folder


def resume(folder: Path, config: TrainConfig, data: ChunkDataset, model: list[DistributedDataParallel],
           optimizer: ChainedOptimizer, groups: ProcessGroupCollection, runtime: Runtime) -> Progress:
    """Continue from the newest whole checkpoint of the run folder, or start at step 0.

    Raises:
        CheckpointError: the run was made with another dataset, seed or batch size, or every checkpoint is damaged.
    """
    info = newest_whole_checkpoint(folder / "checkpoints")
    if info is None:
        return Progress()
    before = info.manifest["config"]["training"]
    faults = []
    if info.manifest["dataset_fingerprint"] != data.fingerprint:
        faults.append(f"dataset {info.manifest['dataset_fingerprint']} where {config.data.path} is {data.fingerprint}")
    for name in ("seed", "global_batch_size"):
        if before[name] != getattr(config.training, name):
            faults.append(f"training.{name} {before[name]} where {getattr(config.training, name)} is asked for")
    if faults:
        raise CheckpointError(f"{info.path} was made with {', '.join(faults)}: choose another output or the same settings")
    return load_checkpoint(info, model, optimizer, groups)


def announce(config: TrainConfig, architecture: ModelArchitecture, layout: ParallelLayout,
             model: list[DistributedDataParallel], data: ChunkDataset, runtime: Runtime, progress: Progress) -> None:
    """One line at the start: what is trained on what, and which accelerated parts are in use."""
    if not runtime.is_main:
        return
    spec = choose_layer_spec(config.model.layer_spec)
    start = f", resumed at step {progress.step}" if progress.step else ""
    teacher = f", teacher {config.teacher.placement} {config.teacher.path}" if config.teacher.path else ""
    sys.stderr.write(
        f"train: {config.model.name} ({architecture.parameters:,} parameters, {parameter_count(model):,} on this rank), "
        f"{layout.describe()} on {runtime.device.type}, {spec} layers, {config.training.precision}, "
        f"{data.num_chunks:,} chunks{teacher}{start}\n"
    )


def unwrap(chunk: torch.nn.Module) -> HiddenStateGPTModel:
    """The model inside DDP."""
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def _is_due(step: int, interval: int | None, last: int) -> bool:
    return step == last or bool(interval and step % interval == 0)
