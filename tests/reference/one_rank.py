"""Small models and training parts in a world of one rank, for unit tests."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.config import from_mapping
from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.models.architecture import ModelArchitecture, architecture_by_name
from megatron_kd.models.gpt import HiddenStateGPTModel, build_model
from megatron_kd.models.parameters import initialize_weights
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.runtime import Runtime
from megatron_kd.training.methods.method_builders import MethodParts, build_losses
from megatron_kd.training.objective import FusedLoss, MicroBatchLoss
from megatron_kd.training.optimizer import build_optimizer
from megatron_kd.training.train_config import TrainConfig
from megatron_kd.training.training_run import TrainingRun, build_student

TINY = ModelArchitecture(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=300,
    rope_theta=10_000.0,
    init_std=0.2,
)


def one_rank_groups() -> ProcessGroupCollection:
    """Groups of a layout without any parallelism; inside ``distributed_runtime``."""
    return create_process_groups(ParallelLayout.for_world(ParallelConfig(), 1))


def tiny_model(architecture: ModelArchitecture = TINY, seed: int = 1, precision: str = "fp32") -> HiddenStateGPTModel:
    """An initialised model; inside ``distributed_runtime``."""
    (model,) = build_model(
        architecture,
        ParallelLayout.for_world(ParallelConfig(), 1),
        one_rank_groups(),
        precision=precision,
        device=torch.device("cpu"),
        max_sequence_length=64,
    )
    initialize_weights(model, architecture.init_std, seed)
    return model


def train_config(dataset: ChunkDataset, output: Path | str = "unused", **keys: Any) -> TrainConfig:
    """A configuration of the smallest named model; ``keys`` are top-level sections."""
    tree = {
        "data": {"path": str(dataset.path)},
        "output": str(output),
        "model": {"name": "qwen_toy_reference"},
        "training": {"global_batch_size": 4, "micro_batch_size": 4, "train_iters": 4},
        **keys,
    }
    return from_mapping(TrainConfig, tree, "test")


def training_run(
    config: TrainConfig,
    dataset: ChunkDataset | None = None,
    runtime: Runtime | None = None,
    *,
    architecture: ModelArchitecture | None = None,
    layout: ParallelLayout | None = None,
    **fields: Any,
) -> TrainingRun:
    """A run without a held-out dataset and, unless ``fields`` say otherwise, without a running teacher."""
    architecture = architecture or architecture_by_name(config.model.name).with_vocab_size(dataset.vocab_size)
    return TrainingRun(
        **{
            "config": config,
            "runtime": runtime or Runtime(torch.device("cpu"), 0, 1),
            "data": dataset,
            "heldout": None,
            "architecture": architecture,
            "teacher_architecture": None,
            "layout": layout or ParallelLayout.for_world(ParallelConfig(), 1),
            "seq_length": config.data.seq_length or (dataset.seq_length if dataset else 1024),
            **fields,
        }
    )


class TrainingParts:
    """What a checkpoint is made of: architecture, layout, groups, DDP-wrapped model, optimizer."""

    def __init__(
        self,
        dataset: ChunkDataset,
        runtime: Runtime,
        seed: int = 10,
        precision: str = "fp32",
        config: TrainConfig | None = None,
    ) -> None:
        self.config = config or train_config(
            dataset, training={"seed": seed, "global_batch_size": 4, "micro_batch_size": 4, "precision": precision}
        )
        self.run = training_run(self.config, dataset, runtime)
        self.architecture, self.layout = self.run.architecture, self.run.layout
        self.groups = create_process_groups(self.layout)
        self.model = build_student(self.run, self.groups)
        self.optimizer = build_optimizer(self.config.optimizer, self.model, self.groups, bf16=precision == "bf16")

    def micro_batch_loss(self, teacher: Any = None, config: TrainConfig | None = None) -> MicroBatchLoss:
        """The loss as ``train`` builds it, of another configuration where one is given."""
        run = dataclasses.replace(self.run, config=config or self.config)
        fused = FusedLoss(self.groups, run.config.distillation.loss)
        return MicroBatchLoss(build_losses(MethodParts(run, self.groups, self.model, teacher, fused)), teacher)
