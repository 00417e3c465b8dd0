"""A training run: data, layout and sizes, resolved once from the configuration; its student and its teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.checkpoints.weights import check_same_architecture, check_same_tokenizer, load_weights, open_checkpoint
from megatron_kd.data.batch import Batch, make_batch
from megatron_kd.data.blend import open_data
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.data.chunk_order import BatchSchedule
from megatron_kd.errors import ConfigError, DataError
from megatron_kd.models.architecture import AS_INIT_FROM, ModelArchitecture, architecture_by_name
from megatron_kd.models.gpt import build_model
from megatron_kd.models.parameters import initialize_weights
from megatron_kd.parallel.layout import ParallelLayout, sequence_multiple
from megatron_kd.parallel.runtime import Runtime, seed_everything
from megatron_kd.teachers import placements
from megatron_kd.teachers.interface import Teacher
from megatron_kd.teachers.placements import StudentRun
from megatron_kd.training.train_config import TrainConfig


@dataclass(frozen=True)
class TrainingRun:
    """A run of ``train``, the same on the student's ranks and on those of a remote teacher.

    Attributes:
        data: the training chunks; of a blend of datasets, what training reads of them.
        architecture: the student's.
        teacher_architecture: that of a teacher whose forward passes are part of the run; None without one.
        layout: the student's.
        seq_length: positions of a row.
    """

    config: TrainConfig
    runtime: Runtime
    data: ChunkDataset
    heldout: ChunkDataset | None
    architecture: ModelArchitecture
    teacher_architecture: ModelArchitecture | None
    layout: ParallelLayout
    seq_length: int

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output)

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.runtime.device

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step of a data-parallel rank."""
        training = self.config.training
        return self.layout.micro_batches(training.global_batch_size, training.micro_batch_size)

    @property
    def positions_per_step(self) -> int:
        """Positions of a global batch."""
        return self.config.training.global_batch_size * self.seq_length

    def as_student(self) -> StudentRun:
        """Return the facts that a teacher depends on."""
        return StudentRun(
            self.data,
            self.architecture,
            self.layout,
            seq_length=self.seq_length,
            precision=self.config.training.precision,
            layer_spec=self.config.model.layer_spec,
            temperature=self.config.distillation.temperature,
            sparse_target=self.config.distillation.sparse_target,
            train_iters=self.config.training.train_iters,
            device=self.device,
            split=self.runtime.split,
        )


class ScheduledData:
    """The global batches of a run by position, as every data-parallel rank of the student reads them."""

    def __init__(self, run: TrainingRun) -> None:
        training = run.config.training
        self._data, self._ranks, self._rows = run.data, run.layout.data, training.micro_batch_size
        self._seq_length, self._mask_prompt = run.seq_length, run.config.data.mask_prompt
        order = run.data.order(training.seed, run.config.data.shuffle)
        self._schedule = BatchSchedule(order, training.global_batch_size)
        self.micro_batches = run.micro_batches

    def chunks(self, position: int) -> list[int]:
        """Return the chunk indices of a global batch."""
        return self._schedule.chunks(position).tolist()

    def read_all(self, position: int, data_rank: int) -> list[Batch]:
        """Read a data-parallel rank's micro-batches of a global batch."""
        rows = self._schedule.micro_batches(position, data_rank, self._ranks, self._rows)
        return [make_batch(self._data, indices, self._seq_length, self._mask_prompt) for indices in rows]

    def read(self, position: int, data_rank: int, micro_batch: int) -> Batch:
        """Read one micro-batch of a global batch."""
        rows = self._schedule.micro_batches(position, data_rank, self._ranks, self._rows)
        return make_batch(self._data, rows[micro_batch], self._seq_length, self._mask_prompt)

    def root_ids(self, batch: Batch) -> torch.Tensor:
        """Return the ids, int64 [b], of a batch's chunks in the root of the dataset."""
        return torch.from_numpy(self._data.root_ids(batch.chunk_indices.numpy()).astype("int64"))


def open_run(config: TrainConfig, runtime: Runtime) -> TrainingRun:
    """Open the data and plan the student's layout.

    Raises:
        DataError: a dataset is missing or damaged, has longer chunks than the model is built for, or another tokenizer.
        ConfigError: the model has fewer ids than the tokenizer.
        LayoutError: the layout divides neither world, model nor batch.
    """
    data = open_training_data(config)
    seq_length = config.data.seq_length or data.seq_length
    heldout = open_heldout(config, data, seq_length)
    architecture = student_architecture(config, data)
    teacher = open_checkpoint(str(config.teacher.path)).architecture if config.teacher.runs_a_model else None
    layout = plan_layout(config, architecture, seq_length, runtime)
    return TrainingRun(config, runtime, data, heldout, architecture, teacher, layout, seq_length)


def open_training_data(config: TrainConfig) -> ChunkDataset:
    """Open the training dataset, or a blend of several.

    Raises:
        DataError: one is missing or damaged, has longer chunks than the model is built for, or no prompts to mask.
    """
    data = cast(ChunkDataset, open_data(config.data.path, config.data.weights))
    if config.data.seq_length is not None and config.data.seq_length < data.seq_length:
        raise DataError(
            f"data.seq_length {config.data.seq_length} is below the {data.seq_length} of {config.data.path}: "
            "tokenise again with shorter chunks"
        )
    if config.data.mask_prompt and data.prompt_lengths is None:
        raise DataError(
            f"{config.data.path} has no prompts for data.mask_prompt to leave out: use a dataset of generate_corpus, "
            "or data.mask_prompt=false"
        )
    return data


def open_heldout(config: TrainConfig, data: ChunkDataset, seq_length: int) -> ChunkDataset | None:
    """Open the held-out dataset; None without one. What the first evaluation could not read is refused here.

    Raises:
        DataError: it is missing or damaged, has another tokenizer or longer chunks, or the layout cannot divide them.
    """
    if not config.data.eval_path:
        return None
    heldout = ChunkDataset.open(config.data.eval_path)
    if heldout.tokenizer_hash != data.tokenizer_hash:
        raise DataError(
            f"{config.data.eval_path} has tokenizer {heldout.tokenizer_hash}, "
            f"{config.data.path} has {data.tokenizer_hash}"
        )
    if heldout.seq_length > seq_length:
        raise DataError(
            f"{config.data.eval_path} has chunks of seq_length {heldout.seq_length}, above the model's {seq_length}: "
            f"tokenise it with data.seq_length={seq_length}, or train with data.seq_length={heldout.seq_length}"
        )
    parallel = config.parallel
    parts = sequence_multiple(
        parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.sequence_parallel
    )
    if heldout.seq_length % parts:
        raise DataError(
            f"{config.data.eval_path} has seq_length {heldout.seq_length}, which this layout cannot divide into "
            f"{parts} parts: tokenise it with data.seq_length={seq_length}"
        )
    return heldout


def student_architecture(config: TrainConfig, data: ChunkDataset) -> ModelArchitecture:
    """Return the architecture that ``model.name`` asks for, its vocabulary filled in.

    Raises:
        ConfigError: it has fewer ids than the tokenizer.
    """
    if config.model.name == AS_INIT_FROM:
        architecture = open_checkpoint(str(config.model.init_from)).architecture
    else:
        architecture = architecture_by_name(config.model.name).with_vocab_size(data.vocab_size)
    if architecture.vocab_size < data.vocab_size:
        raise ConfigError(
            f"model.name {config.model.name} has {architecture.vocab_size} ids, the dataset's tokenizer "
            f"{data.vocab_size}: choose a model with a larger vocabulary"
        )
    return architecture


def plan_layout(
    config: TrainConfig, architecture: ModelArchitecture, seq_length: int, runtime: Runtime
) -> ParallelLayout:
    """Return the layout of the student's world, checked against the model and the batch."""
    num_ranks = runtime.world_size if runtime.split is None else runtime.split.num_students
    layout = ParallelLayout.for_world(config.parallel, num_ranks)
    layout.check_model(architecture, seq_length)
    layout.micro_batches(config.training.global_batch_size, config.training.micro_batch_size)
    return layout


def build_student(run: TrainingRun, groups: ProcessGroupCollection) -> list[DistributedDataParallel]:
    """Build this rank's model chunks with their initial weights, wrapped in Megatron-Core's DDP."""
    config = run.config
    seed_everything(config.training.seed, groups)
    model_chunks = build_model(
        run.architecture,
        run.layout,
        groups,
        precision=config.training.precision,
        device=run.device,
        layer_spec=config.model.layer_spec,
        max_sequence_length=run.seq_length,
    )
    if config.model.init_from is not None:
        info = open_checkpoint(config.model.init_from)
        check_same_tokenizer(info, run.data)
        check_same_architecture(info, run.architecture)
        load_weights(model_chunks, groups, info)
    else:
        for model_chunk in model_chunks:
            initialize_weights(model_chunk, run.architecture.init_std, config.training.seed)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    model = [
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=i > 0, pg_collection=groups)
        for i, chunk in enumerate(model_chunks)
    ]
    for model_chunk in model:
        _connect_schedule(model_chunk, groups)
    return model


def _connect_schedule(model_chunk: DistributedDataParallel, groups: ProcessGroupCollection) -> None:
    """Tell Megatron-Core's schedules how to synchronize the gradients."""
    settings = model_chunk.module.config

    def finalize(model_chunks: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **_: Any) -> None:
        finalize_model_grads(model_chunks, num_tokens, pg_collection=groups)

    settings.finalize_model_grads_func = finalize
    if model_chunk.ddp_config.overlap_grad_reduce:
        settings.no_sync_func = model_chunk.no_sync


def build_teacher(run: TrainingRun, groups: ProcessGroupCollection) -> Teacher | None:
    """Build the teacher that the configuration asks for, with its weights; None without distillation."""
    return placements.build_teacher(run.config.teacher, run.as_student(), groups)
