"""Decoders on Megatron-Core's GPTModel whose last stage returns hidden states instead of logits.

The output layer is applied inside the fused loss (``megatron_kd/losses``), which never holds the logits. So the model
returns what that loss needs: the hidden states after the final norm, and a description of the head.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_kd.errors import ConfigError
from megatron_kd.losses.types import OutputHead
from megatron_kd.losses.weight_gradient import run_forward_pre_hooks
from megatron_kd.models.architecture import LayerSpecName, ModelArchitecture, Precision
from megatron_kd.models.layer_specs import choose_layer_spec, decoder_layer_spec
from megatron_kd.models.local_modules import apply_rotary
from megatron_kd.parallel.groups import is_first_stage, is_last_stage, own_positions
from megatron_kd.parallel.layout import ParallelLayout
from megatron_kd.parallel.mcore_patches.remedies import (
    mark_sharded_weights,
    pipeline_communication,
    scale_rotary,
    use_rotary_kernel,
)

VOCABULARY_MULTIPLE = 128


class HiddenStateGPTModel(GPTModel):
    """GPTModel whose ``forward`` takes whole sequences and returns [sequence, batch, hidden] on the last stage too.

    Under context and sequence parallelism the sequence dimension of what it returns is this rank's part.

    Args:
        valid_vocab_size: ids of the vocabulary, without padded rows.
        options: GPTModel's arguments.
    """

    def __init__(self, *, valid_vocab_size: int, **options: Any):
        super().__init__(**options)
        self.valid_vocab_size = valid_vocab_size

    def forward(self, input_ids: Tensor, position_ids: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Run the stage.

        Args:
            input_ids, position_ids: [batch, sequence], whole on every rank.

        Returns:
            Hidden states, as the class describes them.
        """
        group = self.pg_collection.cp
        return super().forward(
            own_positions(input_ids, group, 1), own_positions(position_ids, group, 1), *arguments, **options
        )

    def _postprocess(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        if self.post_process:
            run_forward_pre_hooks(self.output_layer)  # the loss uses its weight outside its forward
        return hidden_states

    def output_head(self) -> OutputHead:
        """Describe this rank's part of the output layer (last pipeline stage only)."""
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return OutputHead(
            weight=weight,
            valid_vocab_size=self.valid_vocab_size,
            vocab_start=self.pg_collection.tp.rank() * weight.shape[0],
            bias=self.output_layer.bias,
        )


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Return the rows of the embedding over all ranks: a multiple of 128 x TP, as Megatron pads."""
    multiple = VOCABULARY_MULTIPLE * tensor_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def transformer_config(
    architecture: ModelArchitecture, layout: ParallelLayout, *, precision: Precision, device: torch.device
) -> TransformerConfig:
    """Return Megatron-Core's configuration of ``architecture`` under ``layout``."""
    on_cuda = device.type == "cuda"
    if not on_cuda:
        use_rotary_kernel(apply_rotary)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.add_qkv_bias,
        qk_layernorm=architecture.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=precision == "bf16",
        **pipeline_communication(is_interleaved=layout.virtual_pipeline is not None),
        perform_initialization=False,
        use_cpu_initialization=not on_cuda,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=on_cuda and _has_fused_weight_gradient(),
        bias_activation_fusion=on_cuda,
        use_te_activation_func=not on_cuda,  # how the layer spec's SwiGLU is put in
        apply_rope_fusion=not on_cuda,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
    )


def build_model(
    architecture: ModelArchitecture,
    layout: ParallelLayout,
    groups: ProcessGroupCollection,
    *,
    precision: Precision,
    device: torch.device,
    layer_spec: LayerSpecName = "auto",
    max_sequence_length: int,
) -> list[HiddenStateGPTModel]:
    """Build this rank's model chunks (one, or one per virtual pipeline stage), uninitialised, on ``device``.

    Raises:
        ConfigError: sequences exceed the architecture's sliding window, or the layer spec is not available here.
    """
    if architecture.sliding_window and max_sequence_length > architecture.sliding_window:
        raise ConfigError(
            f"sequences of {max_sequence_length} tokens exceed the sliding window of {architecture.sliding_window} of "
            "this model's attention, which is not supported: use data.seq_length of at most the window"
        )
    config = transformer_config(architecture, layout, precision=precision, device=device)
    spec = choose_layer_spec(layer_spec)
    num_virtual = layout.virtual_pipeline or 1
    model_chunks = []
    for number in range(num_virtual):
        virtual_stage = number if layout.virtual_pipeline else None
        num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage, pp_rank=groups.pp.rank())
        chunk = HiddenStateGPTModel(
            valid_vocab_size=architecture.vocab_size,
            config=config,
            transformer_layer_spec=decoder_layer_spec(spec, config, num_layers),
            vocab_size=padded_vocab_size(architecture.vocab_size, layout.tensor),
            max_sequence_length=max_sequence_length,
            pre_process=is_first_stage(groups) and number == 0,
            post_process=is_last_stage(groups) and number == num_virtual - 1,
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            pg_collection=groups,
            vp_stage=virtual_stage,
        ).to(device)
        if config.bf16:
            chunk.bfloat16()
        if architecture.rope_scaling_factor != 1.0 and hasattr(chunk, "rotary_pos_emb"):
            scale_rotary(
                chunk.rotary_pos_emb,
                factor=architecture.rope_scaling_factor,
                low_freq_factor=architecture.rope_low_freq_factor,
                high_freq_factor=architecture.rope_high_freq_factor,
                original_positions=architecture.rope_original_positions,
            )
        mark_sharded_weights(chunk)
        model_chunks.append(chunk)
    return model_chunks


@torch.no_grad()
def full_logits(model: HiddenStateGPTModel, tokens: Tensor) -> Tensor:
    """Compute all logits of ``tokens`` under an unpipelined model, for parity checks on short inputs.

    Args:
        tokens: [batch, sequence] ids.

    Returns:
        [batch, sequence, vocabulary], without padded ids.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    hidden = model(tokens, positions, None)
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=model.pg_collection.tp)
    logits = torch.nn.functional.linear(hidden, model.output_head().weight)
    group = model.pg_collection.tp
    if group.size() > 1:
        shards = [torch.empty_like(logits) for _ in range(group.size())]
        torch.distributed.all_gather(shards, logits.contiguous(), group=group)
        logits = torch.cat(shards, dim=-1)
    return logits.transpose(0, 1)[..., : model.valid_vocab_size]


def parameter_count(model_chunks: Sequence[torch.nn.Module]) -> int:
    """Return the number of parameters on this rank."""
    return sum(parameter.numel() for chunk in model_chunks for parameter in chunk.parameters())


def _has_fused_weight_gradient() -> bool:
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    except ImportError:
        return False
    return True
