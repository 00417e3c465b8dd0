"""Logits equal to transformers' Qwen2ForCausalLM with the same weights; shapes and padding of the vocabulary."""

import dataclasses

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_kd.models.gpt import full_logits, padded_vocab_size
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import TINY, tiny_model


def qwen2_with_the_weights_of(model, architecture):
    """A Hugging Face model filled by plain slicing of Megatron-Core's fused matrices."""
    reference = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=architecture.vocab_size,
            hidden_size=architecture.hidden_size,
            intermediate_size=architecture.ffn_hidden_size,
            num_hidden_layers=architecture.num_layers,
            num_attention_heads=architecture.num_attention_heads,
            num_key_value_heads=architecture.num_query_groups,
            rope_theta=architecture.rope_theta,
            rms_norm_eps=architecture.norm_epsilon,
            tie_word_embeddings=architecture.tie_word_embeddings,
            attn_implementation="eager",
        )
    ).eval()
    ours = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    vocabulary, groups, width = architecture.vocab_size, architecture.num_query_groups, architecture.head_dim
    per_group = architecture.num_attention_heads // groups
    state = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"][:vocabulary],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
    }
    head = "embedding.word_embeddings.weight" if architecture.tie_word_embeddings else "output_layer.weight"
    state["lm_head.weight"] = ours[head][:vocabulary]
    for layer in range(architecture.num_layers):
        mine, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            fused = ours[f"{mine}self_attention.linear_qkv.{kind}"]
            parts = fused.view(groups, per_group + 2, width, *fused.shape[1:])
            for name, part in (("q", parts[:, :per_group]), ("k", parts[:, per_group]), ("v", parts[:, per_group + 1])):
                state[f"{theirs}self_attn.{name}_proj.{kind}"] = part.reshape(-1, *fused.shape[1:])
        gate, up = ours[f"{mine}mlp.linear_fc1.weight"].chunk(2)
        state |= {
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": ours[f"{mine}mlp.linear_fc2.weight"],
            f"{theirs}self_attn.o_proj.weight": ours[f"{mine}self_attention.linear_proj.weight"],
            f"{theirs}input_layernorm.weight": ours[f"{mine}input_layernorm.weight"],
            f"{theirs}post_attention_layernorm.weight": ours[f"{mine}pre_mlp_layernorm.weight"],
        }
    reference.load_state_dict(state)
    return reference


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_logits_equal_transformers(tied, groups):
    architecture = dataclasses.replace(TINY, num_query_groups=groups, tie_word_embeddings=tied)
    tokens = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(3))
    with distributed_runtime(), torch.no_grad():
        model = tiny_model(architecture).eval()
        for name, parameter in model.named_parameters():  # biases and norms start at 0 and 1: make them count
            if parameter.dim() == 1:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))), alpha=0.3
                )
        ours = full_logits(model, tokens)
        theirs = qwen2_with_the_weights_of(model, architecture)(tokens).logits
    assert ours.shape == (3, 20, 300)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert theirs.std() > 0.5, "the comparison needs logits that differ"


def test_the_model_gives_hidden_states_and_a_head_that_knows_its_padding():
    with distributed_runtime():
        model = tiny_model()
        hidden = model(torch.zeros(2, 8, dtype=torch.long), torch.arange(8).expand(2, 8), None)
        head = model.output_head()
    assert hidden.shape == (8, 2, 32)
    assert head.weight.shape == (384, 32) and head.valid_vocab_size == 300 and head.vocab_start == 0
    assert not head.weight[300:].any(), "padded rows start at 0"


@pytest.mark.parametrize(
    ("vocabulary", "tensor", "rows"), [(300, 1, 384), (384, 1, 384), (385, 2, 512), (151_936, 8, 152_576)]
)
def test_padding(vocabulary, tensor, rows):
    assert padded_vocab_size(vocabulary, tensor) == rows
    assert rows % (128 * tensor) == 0


def test_bf16_weights():
    with distributed_runtime():
        assert {parameter.dtype for parameter in tiny_model(precision="bf16").parameters()} == {torch.bfloat16}
