"""Memory of a rank by part, as arithmetic on the same layout that training uses; tests compare it with tensor bytes.

What is counted: weights, gradients and optimizer state as Megatron-Core's DDP and distributed optimizer hold them (fp32
gradients; under bf16 fp32 master weights beside the two Adam moments, sharded over data parallelism); activations that
autograd keeps for the micro-batches in flight (no recomputation); the fused loss's logit chunks and the gradient of its
hidden states; what a teacher adds is in teacher_memory.py. Not counted: the CUDA context, NCCL buffers and
fragmentation; plan.usable_memory leaves room for them.
"""

import math
from dataclasses import dataclass, fields
from typing import Sequence

from megatron_kd.models.architecture import ModelArchitecture
from megatron_kd.parallel.layout import ParallelLayout

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
GRADIENT_BYTES = 4
ADAM_BYTES = 8
MASTER_BYTES = {"fp32": 0, "bf16": 4}
VOCABULARY_MULTIPLE = 128
LOSS_CHUNK_BYTES = {"cuda": 896 << 20, "cpu": 1280 << 20}
"""As losses/fused_linear.py; a test compares them."""
LOGIT_BYTES = 4
LOSS_TEMPORARY_BYTES = 32 << 20

# Tensors that autograd keeps for one layer's backward pass, in units of [positions, width].
HIDDEN_REPLICATED = 4  # inputs and outputs of both norms
ATTENTION_QUERY = 2  # the rotated query, the context
FFN_FUSED, FFN_UNFUSED = 3, 4  # [gate, up] and their product; unfused: silu(gate) as well


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    loss: float = 0
    teacher_weights: float = 0
    teacher_activations: float = 0

    @property
    def total(self) -> float:
        """All parts."""
        return sum(getattr(self, part.name) for part in fields(self))


def padded_rows(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding over all ranks (``models/gpt.py``, ``padded_vocab_size``)."""
    multiple = VOCABULARY_MULTIPLE * tensor
    return math.ceil(vocab_size / multiple) * multiple


def rank_parameters(
    architecture: ModelArchitecture, layout: ParallelLayout, stage: int, layers: Sequence[int] | None = None
) -> int:
    """Parameters on one rank of pipeline stage ``stage``: both ends of a pipeline hold the embedding of a tied model.

    Args:
        layers: layers of every stage; None for an even split.
    """
    a, tp = architecture, layout.tensor
    own_layers = layers[stage] if layers else a.num_layers // layout.pipeline
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    sharded = a.hidden_size * (queries + 2 * keys) + queries * a.hidden_size + 3 * a.hidden_size * a.ffn_hidden_size
    if a.add_qkv_bias:
        sharded += queries + 2 * keys
    total = own_layers * (sharded // tp + 2 * a.hidden_size + (2 * a.head_dim if a.qk_layernorm else 0))
    vocabulary = padded_rows(a.vocab_size, tp) // tp * a.hidden_size
    first, last = stage == 0, stage == layout.pipeline - 1
    if first:
        total += vocabulary
    if last:
        total += a.hidden_size + (0 if first and a.tie_word_embeddings else vocabulary)
    return total


def layer_activation_bytes(
    architecture: ModelArchitecture, layout: ParallelLayout, positions: int, precision: str, fused: bool
) -> float:
    """What autograd keeps for one layer and one micro-batch of ``positions`` tokens on a rank."""
    a, tp = architecture, layout.tensor
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    replicated = HIDDEN_REPLICATED * a.hidden_size / (tp if layout.sequence_parallel else 1)
    if layout.context == 1:
        # The value is a view of the whole [query, key, value] product, which so stays; the rotated key is its own.
        attention = (ATTENTION_QUERY * queries + keys + (queries + 2 * keys)) / tp
    else:
        # The halves of the context as well as the whole; keys and values of all ranks (models/attention.py).
        attention = ((ATTENTION_QUERY + 1) * queries + layout.context * 2 * keys) / tp
    ffn = (FFN_FUSED if fused else FFN_UNFUSED) * a.ffn_hidden_size / tp
    return positions / layout.context * (replicated + attention + ffn) * ELEMENT_BYTES[precision]


def in_flight_layers(
    architecture: ModelArchitecture, layout: ParallelLayout, stage: int, micro_batches: int,
    layers: Sequence[int] | None = None,
) -> int:
    """Layers times micro-batches whose activations a stage holds at once under 1F1B, interleaved or not."""
    own = layers[stage] if layers else architecture.num_layers // layout.pipeline
    remaining = layout.pipeline - stage
    if layout.virtual_pipeline is None:
        return own * min(remaining, micro_batches)
    chunks = 2 * (remaining - 1) + (layout.virtual_pipeline - 1) * layout.pipeline + 1
    return own // layout.virtual_pipeline * min(chunks, micro_batches * layout.virtual_pipeline)


def loss_chunk_bytes(
    architecture: ModelArchitecture, layout: ParallelLayout, tokens: float, precision: str, models: int,
    device: str = "cuda", budget: int | None = None,
) -> float:
    """Buffers of the fused loss's logits (``losses/chunk_plan.py``): fp32; under bf16 the narrow product beside it."""
    budget = budget or LOSS_CHUNK_BYTES[device]
    per_logit = LOGIT_BYTES * models + (ELEMENT_BYTES["bf16"] if precision == "bf16" else 0)
    whole = tokens * padded_rows(architecture.vocab_size, layout.tensor) / layout.tensor * per_logit
    return min(whole, budget - min(budget // 4, LOSS_TEMPORARY_BYTES))


def student_memory(
    architecture: ModelArchitecture,
    layout: ParallelLayout,
    stage: int,
    *,
    precision: str,
    micro_batch_size: int,
    seq_length: int,
    micro_batches: int,
    layers: Sequence[int] | None = None,
    models_in_loss: int = 1,
    fused: bool = True,
    device: str = "cuda",
    loss_chunk_budget: int | None = None,
) -> RankMemory:
    """Memory of the student on one rank of ``stage``."""
    a, width = architecture, ELEMENT_BYTES[precision]
    parameters = rank_parameters(a, layout, stage, layers)
    positions = micro_batch_size * seq_length
    shards = layout.data * layout.context
    alive = in_flight_layers(a, layout, stage, micro_batches, layers)
    activations = alive * layer_activation_bytes(a, layout, positions, precision, fused)
    loss = 0.0
    if stage == layout.pipeline - 1:
        tokens = positions / layout.context
        hidden = tokens * a.hidden_size * width
        activations += hidden  # input of the final norm
        loss = 2 * hidden + loss_chunk_bytes(a, layout, tokens, precision, models_in_loss, device, loss_chunk_budget)
    return RankMemory(
        weights=parameters * width,
        gradients=parameters * GRADIENT_BYTES,
        optimizer=parameters * (ADAM_BYTES + MASTER_BYTES[precision]) / shards,
        activations=activations,
        loss=loss,
    )


def together(student: RankMemory, teacher: RankMemory | None) -> RankMemory:
    """Both on one rank."""
    if teacher is None:
        return student
    return RankMemory(**{part.name: getattr(student, part.name) + getattr(teacher, part.name)
                         for part in fields(RankMemory)})
