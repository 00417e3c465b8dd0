"""Parallel layouts as arithmetic: which rank is where, and whether a model and a batch fit. No communication.

Ranks are numbered as Megatron-Core does by default: tensor parallel fastest, then context, data, pipeline.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Iterator, Protocol

from megatron_kd.errors import LayoutError


@dataclass(frozen=True)
class ParallelConfig:
    """The ``parallel.*`` keys, named as in Megatron-Core."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: int | None = None
    """None means an even share of the layers that the last stage leaves."""
    num_layers_in_last_pipeline_stage: int | None = None
    """None means an even share; fewer make room for output layer, loss and teacher's head (``plan_run``)."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            if getattr(self, name) < 1:
                yield f"'parallel.{name}' must be at least 1, not {getattr(self, name)}"
        if self.virtual_pipeline_model_parallel_size is not None:
            if self.virtual_pipeline_model_parallel_size < 2 or self.pipeline_model_parallel_size < 2:
                yield (
                    "'parallel.virtual_pipeline_model_parallel_size' must be at least 2, on a pipeline of at least 2 "
                    f"stages, not {self.virtual_pipeline_model_parallel_size} on {self.pipeline_model_parallel_size}"
                )
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
            count = getattr(self, name)
            if count is not None and (count < 1 or self.pipeline_model_parallel_size < 2):
                yield (
                    f"'parallel.{name}' must be at least 1, on a pipeline of at least 2 stages, not {count} on "
                    f"{self.pipeline_model_parallel_size}"
                )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            yield "'parallel.sequence_parallel' needs 'parallel.tensor_model_parallel_size' above 1"
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            yield "'parallel.overlap_param_gather' needs 'parallel.overlap_grad_reduce'"

    def context_parallel_faults(self, why: str) -> Iterator[str]:
        """Yield a message if sequences are to be cut, for a verb that cannot; ``why`` completes it."""
        if self.context_parallel_size > 1:
            yield f"'parallel.context_parallel_size' must be 1: {why}"


def sequence_multiple(tensor: int, context: int, sequence_parallel: bool) -> int:
    """Return the number that every sequence's length must be a multiple of, so that its parts are equally long."""
    return math.lcm(tensor * context if sequence_parallel else 1, 2 * context if context > 1 else 1)


class ModelSizes(Protocol):
    """The sizes of a model that a layout divides."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_query_groups(self) -> int: ...

    @property
    def ffn_hidden_size(self) -> int: ...


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of every parallel dimension over ``world_size`` ranks, and the place of each rank.

    Attributes:
        virtual_pipeline: virtual stages of each pipeline stage; None without interleaving.
        first_stage_layers: layers of the pipeline's first stage; None means an even share.
        last_stage_layers: layers of its last stage, likewise.
    """

    tensor: int
    pipeline: int
    context: int
    data: int
    virtual_pipeline: int | None = None
    sequence_parallel: bool = False
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    @classmethod
    def for_world(cls, config: ParallelConfig, world_size: int) -> "ParallelLayout":
        """Return the layout of ``config``, filled up with data parallelism.

        Raises:
            LayoutError: ``world_size`` is not a multiple of TP x PP x CP.
        """
        tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
        context = config.context_parallel_size
        model_ranks = tensor * pipeline * context
        if world_size % model_ranks:
            raise LayoutError(
                f"{world_size} ranks do not divide into tensor x pipeline x context parallel = "
                f"{tensor} x {pipeline} x {context} = {model_ranks}: start a multiple of {model_ranks} ranks"
            )
        return cls(
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            data=world_size // model_ranks,
            virtual_pipeline=config.virtual_pipeline_model_parallel_size,
            sequence_parallel=config.sequence_parallel,
            first_stage_layers=config.num_layers_in_first_pipeline_stage,
            last_stage_layers=config.num_layers_in_last_pipeline_stage,
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.context * self.data

    def coordinates(self, rank: int) -> "RankCoordinates":
        """Return the place of ``rank`` in each dimension."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return RankCoordinates(tensor=tensor, context=context, data=data, pipeline=pipeline)

    def rank_at(self, *, tensor: int, data: int, pipeline: int, context: int = 0) -> int:
        """The rank that stands there: the inverse of ``coordinates``."""
        return ((pipeline * self.data + data) * self.context + context) * self.tensor + tensor

    def rank_groups(self, *dimensions: str) -> list[list[int]]:
        """Return all groups of ranks that differ only in ``dimensions``, in rank order, sorted by first rank."""
        fixed = [name for name in ("tensor", "context", "data", "pipeline") if name not in dimensions]
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.coordinates(rank)
            groups.setdefault(tuple(getattr(place, name) for name in fixed), []).append(rank)
        return sorted(groups.values())

    def check_model(self, model: ModelSizes, seq_length: int) -> None:
        """Raise :class:`LayoutError`, naming every part of a model that this layout does not divide."""
        num_layers, model_chunks = model.num_layers, self.pipeline * (self.virtual_pipeline or 1)
        needs = [
            (model.num_attention_heads, self.tensor, "attention heads", "tensor_model_parallel_size"),
            (model.num_query_groups, self.tensor, "query groups (key-value heads)", "tensor_model_parallel_size"),
            (model.ffn_hidden_size, self.tensor, "feed-forward width", "tensor_model_parallel_size"),
        ]
        ends = [count for count in (self.first_stage_layers, self.last_stage_layers) if count is not None]
        if not ends:
            needs.append((num_layers, model_chunks, "layers", "pipeline_model_parallel_size (times virtual stages)"))
        else:
            needs += self._uneven_needs(num_layers, ends)
        if self.sequence_parallel:
            name = "tensor_model_parallel_size (sequence parallel)"
            name += " x context_parallel_size" if self.context > 1 else ""
            needs.append((seq_length, self.tensor * self.context, "sequence length", name))
        if self.context > 1:
            needs.append((seq_length, 2 * self.context, "sequence length", "2 x context_parallel_size"))
        faults = [f"{what} {have} do not divide by {key} {by}" for have, by, what, key in needs if have % by]
        if faults:
            raise LayoutError("; ".join(faults))

    def stage_layers(self, num_layers: int) -> list[int]:
        """Return the layers of every pipeline stage of a model that :meth:`check_model` has accepted."""
        ends = [count for count in (self.first_stage_layers, self.last_stage_layers) if count is not None]
        between = self.pipeline - len(ends)
        share = (num_layers - sum(ends)) // between if between else 0
        layers = [share] * self.pipeline
        layers[0] = self.first_stage_layers or share
        layers[-1] = self.last_stage_layers or layers[-1]
        return layers

    def _uneven_needs(self, num_layers: int, ends: list[int]) -> list[tuple[int, int, str, str]]:
        """What an uneven pipeline must divide; see :meth:`check_model`."""
        virtual, between = self.virtual_pipeline or 1, self.pipeline - len(ends)
        rest = num_layers - sum(ends)
        if rest < between or (between == 0 and rest):
            raise LayoutError(
                f"the pipeline's ends take {sum(ends)} of {num_layers} layers, {rest} are left for {between} stages"
            )
        needs = [(count, virtual, "layers of an end of the pipeline", "virtual stages") for count in ends]
        if between:
            needs.append((rest, between * virtual, "layers between the given ends", "their stages (times virtual)"))
        return needs

    def micro_batches(self, global_batch_size: int, micro_batch_size: int) -> int:
        """Return the micro-batches per step on each data-parallel rank.

        Raises:
            LayoutError: the global batch does not divide by micro-batch size x data-parallel size, or an interleaved
                pipeline gets a number of micro-batches that is not a multiple of its stages.
        """
        per_round = micro_batch_size * self.data
        if global_batch_size % per_round:
            raise LayoutError(
                f"training.global_batch_size {global_batch_size} does not divide by training.micro_batch_size "
                f"{micro_batch_size} x data-parallel size {self.data} = {per_round}"
            )
        count = global_batch_size // per_round
        if self.virtual_pipeline and count % self.pipeline:
            raise LayoutError(
                f"{count} micro-batches do not divide by pipeline_model_parallel_size {self.pipeline}, "
                "which an interleaved pipeline needs"
            )
        return count

    def describe(self) -> str:
        """Return the layout in short, ``TP2 PP2 DP1``."""
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}"]
        if self.virtual_pipeline:
            parts.append(f"VPP{self.virtual_pipeline}")
        if self.context > 1:
            parts.append(f"CP{self.context}")
        if self.sequence_parallel:
            parts.append("SP")
        return " ".join([*parts, f"DP{self.data}"])


@dataclass(frozen=True)
class RankCoordinates:
    """A rank's index in each parallel dimension."""

    tensor: int
    context: int
    data: int
    pipeline: int


def as_mapping(layout: ParallelLayout) -> dict[str, int | bool | None]:
    """Return the layout as plain values, for manifests."""
    return dataclasses.asdict(layout)
