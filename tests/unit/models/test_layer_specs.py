"""Which parts a layer has without Transformer Engine, and that asking for it by name there is refused."""

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_kd.errors import ConfigError
from megatron_kd.models import layer_specs
from megatron_kd.models.attention import SDPACoreAttention
from megatron_kd.models.layer_specs import choose_layer_spec
from megatron_kd.models.local_modules import RMSNorm
from megatron_kd.parallel.runtime import distributed_runtime
from tests.reference.one_rank import tiny_model


def test_choice(monkeypatch):
    monkeypatch.setattr(layer_specs, "has_transformer_engine", lambda: True)
    assert (choose_layer_spec("auto"), choose_layer_spec("te"), choose_layer_spec("local")) == ("te", "te", "local")
    monkeypatch.setattr(layer_specs, "has_transformer_engine", lambda: False)
    assert choose_layer_spec("auto") == "local"
    with pytest.raises(ConfigError, match="not available here: use 'auto'"):
        choose_layer_spec("te")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, Transformer Engine may be there")
def test_local_layers_are_ours_and_megatrons():
    assert not layer_specs.has_transformer_engine()
    with distributed_runtime():
        layer = tiny_model().decoder.layers[0]
    assert type(layer.input_layernorm) is type(layer.pre_mlp_layernorm) is RMSNorm
    assert type(layer.self_attention.core_attention) is SDPACoreAttention
    assert type(layer.self_attention.linear_qkv) is type(layer.mlp.linear_fc1) is ColumnParallelLinear
    assert type(layer.self_attention.linear_proj) is type(layer.mlp.linear_fc2) is RowParallelLinear
