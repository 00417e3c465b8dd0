"""A trained model for use without training (scoring, evaluation), under the layout that the caller's ranks have."""

from dataclasses import dataclass

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import CheckpointError
from megatron_kd.models.gpt import HiddenStateGPTModel, Precision, build_model
from megatron_kd.models.layer_specs import LayerSpecName
from megatron_kd.models.weights import CheckpointInfo, load_weights, open_checkpoint
from megatron_kd.parallel.groups import create_process_groups
from megatron_kd.parallel.layout import ParallelConfig, ParallelLayout
from megatron_kd.parallel.runtime import Runtime, seed_everything


@dataclass(frozen=True)
class LoadedModel:
    """Frozen model chunks of this rank, with their groups and the checkpoint that they come from."""

    chunks: list[HiddenStateGPTModel]
    groups: ProcessGroupCollection
    layout: ParallelLayout
    info: CheckpointInfo


@dataclass(frozen=True)
class ScoredModelConfig:
    """The ``model.*`` keys of scoring and evaluation."""

    path: str
    """A checkpoint folder or a run folder."""
    layer_spec: LayerSpecName = "auto"
    precision: Precision | None = None
    """None means as trained."""


def load_for_inference(
    config: ScoredModelConfig, parallel: ParallelConfig, dataset: ChunkDataset, runtime: Runtime
) -> LoadedModel:
    """Load a checkpoint for forward passes over ``dataset``. Collective over the world.

    Raises:
        CheckpointError: it is missing or damaged, or reads other ids than the dataset holds.
    """
    info = open_checkpoint(config.path)
    check_same_tokenizer(info, dataset)
    architecture = info.architecture
    layout = ParallelLayout.for_world(parallel, runtime.world_size)
    layout.check_model(
        num_layers=architecture.num_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        ffn_hidden_size=architecture.ffn_hidden_size,
        seq_length=dataset.seq_length,
    )
    groups = create_process_groups(layout)
    seed_everything(0, groups)  # the embedding asks for Megatron-Core's generators under sequence parallelism
    chunks = build_model(
        architecture,
        layout,
        groups,
        precision=config.precision or info.manifest["precision"],
        device=runtime.device,
        layer_spec=config.layer_spec,
        max_sequence_length=dataset.seq_length,
    )
    load_weights(chunks, groups, info)
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return LoadedModel(chunks, groups, layout, info)


def check_same_tokenizer(info: CheckpointInfo, dataset: ChunkDataset) -> None:
    """Raise :class:`CheckpointError` if a model reads other ids than the dataset holds."""
    if info.tokenizer_hash != dataset.tokenizer_hash:
        raise CheckpointError(
            f"{info.path} was trained with tokenizer {info.tokenizer_hash}, but the dataset {dataset.path} has "
            f"{dataset.tokenizer_hash}: use a dataset of the same tokenizer"
        )
    rows = info.architecture.vocab_size
    if rows < dataset.vocab_size:  # a vocabulary-parallel embedding would give zeros for the others
        raise CheckpointError(
            f"{info.path} has embeddings for {rows} ids, but the tokenizer of the dataset {dataset.path} has "
            f"{dataset.vocab_size}: use a model with all of them"
        )
