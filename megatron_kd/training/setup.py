"""From a configuration to the objects that a run trains with: datasets, layout, student, teacher."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.checkpoints.weights import check_same_architecture, check_same_tokenizer, load_weights, open_checkpoint
from megatron_kd.data.blend import open_data
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import ConfigError, DataError
from megatron_kd.models.architecture import AS_INIT_FROM, ModelArchitecture, architecture_by_name
from megatron_kd.models.gpt import HiddenStateGPTModel, build_model
from megatron_kd.models.parameters import initialize_weights
from megatron_kd.parallel.layout import ParallelLayout, sequence_multiple
from megatron_kd.parallel.runtime import Runtime, seed_everything
from megatron_kd.teachers import placements
from megatron_kd.teachers.interface import Teacher
from megatron_kd.teachers.placements import StudentRun
from megatron_kd.training.train_config import TrainConfig


def open_datasets(config: TrainConfig) -> tuple[ChunkDataset, ChunkDataset | None]:
    """The training and the held-out dataset.

    Raises:
        DataError: one is missing or damaged, has longer chunks than the model is built for, or another tokenizer.
    """
    data = open_data(config.data.path, config.data.weights)
    heldout = ChunkDataset.open(config.data.eval_path) if config.data.eval_path else None
    if config.data.seq_length is not None and config.data.seq_length < data.seq_length:
        raise DataError(
            f"data.seq_length {config.data.seq_length} is below the {data.seq_length} of {config.data.path}: "
            "tokenise again with shorter chunks"
        )
    if config.data.mask_prompt and data.prompt_lengths is None:
        raise DataError(
            f"{config.data.path} has no prompts, so data.mask_prompt cannot leave them out: use a dataset of "
            "generate_corpus, or data.mask_prompt=false"
        )
    if heldout is not None:
        _check_heldout(config, data, heldout)
    return data, heldout


def _check_heldout(config: TrainConfig, data: ChunkDataset, heldout: ChunkDataset) -> None:
    """Refuse before the first step what the first evaluation could not read."""
    if heldout.tokenizer_hash != data.tokenizer_hash:
        raise DataError(
            f"{config.data.eval_path} has tokenizer {heldout.tokenizer_hash}, "
            f"{config.data.path} has {data.tokenizer_hash}"
        )
    seq_length = config.data.seq_length or data.seq_length
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


def student_architecture(config: TrainConfig, data: ChunkDataset) -> ModelArchitecture:
    """The architecture that ``model.name`` asks for, its vocabulary filled in."""
    if config.model.name == AS_INIT_FROM:
        return open_checkpoint(config.model.init_from).architecture
    return architecture_by_name(config.model.name).with_vocab_size(data.vocab_size)


def plan_layout(
    config: TrainConfig, architecture: ModelArchitecture, data: ChunkDataset, runtime: Runtime
) -> ParallelLayout:
    """The layout of this world, checked against the model and the batch."""
    if architecture.vocab_size < data.vocab_size:
        raise ConfigError(
            f"model.name {config.model.name} has {architecture.vocab_size} ids, the dataset's tokenizer "
            f"{data.vocab_size}: choose a model with a larger vocabulary"
        )
    layout = ParallelLayout.for_world(config.parallel, runtime.world_size)
    layout.check_model(architecture, config.data.seq_length or data.seq_length)
    layout.micro_batches(config.training.global_batch_size, config.training.micro_batch_size)
    return layout


def build_student(
    config: TrainConfig,
    architecture: ModelArchitecture,
    data: ChunkDataset,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    runtime: Runtime,
) -> list[DistributedDataParallel]:
    """The trainable model: chunks with their initial weights, wrapped in Megatron-Core's DDP."""
    seed_everything(config.training.seed, groups)
    chunks = build_model(
        architecture,
        layout,
        groups,
        precision=config.training.precision,
        device=runtime.device,
        layer_spec=config.model.layer_spec,
        max_sequence_length=config.data.seq_length or data.seq_length,
    )
    if config.model.init_from is not None:
        info = open_checkpoint(config.model.init_from)
        check_same_tokenizer(info, data)
        check_same_architecture(info, architecture)
        load_weights(chunks, groups, info)
    else:
        for chunk in chunks:
            initialize_weights(chunk, architecture.init_std, config.training.seed)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    model = [
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=i > 0, pg_collection=groups)
        for i, chunk in enumerate(chunks)
    ]
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


def running_teacher(config: TrainConfig) -> ModelArchitecture | None:
    """The architecture of a teacher whose forward passes are part of the run."""
    return open_checkpoint(config.teacher.path).architecture if config.teacher.runs_a_model else None


def student_run(
    config: TrainConfig, architecture: ModelArchitecture, data: ChunkDataset, layout: ParallelLayout, runtime: Runtime
) -> StudentRun:
    """Return the facts about this run that a teacher depends on."""
    return StudentRun(
        data,
        architecture,
        layout,
        seq_length=config.data.seq_length or data.seq_length,
        precision=config.training.precision,
        layer_spec=config.model.layer_spec,
        temperature=config.distillation.temperature,
        sparse_target=config.distillation.sparse_target,
        train_iters=config.training.train_iters,
        device=runtime.device,
        split=runtime.split,
    )


def build_teacher(
    config: TrainConfig,
    architecture: ModelArchitecture,
    data: ChunkDataset,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    runtime: Runtime,
) -> Teacher | None:
    """Build the teacher that the configuration asks for, with its weights; None without distillation."""
    return placements.build_teacher(config.teacher, student_run(config, architecture, data, layout, runtime), groups)


def unwrap(chunk: torch.nn.Module) -> HiddenStateGPTModel:
    """The model inside DDP."""
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
