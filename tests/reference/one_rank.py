"""Small models and training parts in a world of one rank, for unit tests."""

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
from megatron_kd.training.optimizer import build_optimizer
from megatron_kd.training.setup import build_student
from megatron_kd.training.train_config import TrainConfig

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
        self.architecture = architecture_by_name(self.config.model.name).with_vocab_size(dataset.vocab_size)
        self.layout = ParallelLayout.for_world(ParallelConfig(), 1)
        self.groups = create_process_groups(self.layout)
        self.model = build_student(self.config, self.architecture, dataset, self.layout, self.groups, runtime)
        self.optimizer = build_optimizer(self.config.optimizer, self.model, self.groups, bf16=precision == "bf16")
